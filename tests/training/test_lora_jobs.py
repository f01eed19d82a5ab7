"""Jobs with a `lora:` block: the same losses on every backend, resumed on another, exported as the block says."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.jobs import LLAMA, Run, command, in_ranks, losses, write_job
from tests.jobs import run as typed

LORA = {"r": 4, "alpha": 8, "target_modules": ["linear"]}
"""In the blocks of TinyLM."""
BACKENDS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {"backend": "replicated"}),
    "ddp": (3, {"backend": "replicated"}),
    "offload": (3, {"fsdp_cpu_offload": True}),
    **{f"zero{s}": (2, {"backend": "deepspeed", "deepspeed": {"zero_optimization": {"stage": s}}}) for s in range(4)},
}


@pytest.fixture(scope="module")
def adapted(run: Run, folder: Path) -> Path:
    """The run folder of eight steps of adapters, FSDP2 on two ranks."""
    run(2, write_job(folder / "adapted.yaml", lora={**LORA, "export": "both"}))
    return folder / "adapted"


def test_what_a_job_leaves(adapted: Path, whole: Path) -> None:
    assert {p.name for p in (adapted / "adapter").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "export_manifest.json",
    }  # fmt: skip
    assert {p.name for p in (adapted / "model").iterdir()} == {p.name for p in (whole / "model").iterdir()}
    sizes = [sum(p.stat().st_size for p in (of / "checkpoints").rglob("*.safetensors")) for of in (adapted, whole)]
    assert sizes[0] < 0.5 * sizes[1]
    assert losses(adapted)[-1] < losses(adapted)[0]


@pytest.mark.full
def test_an_export_that_is_left_from_before_is_named(adapted: Path, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(adapted, folder / "later")
    settings = {"max_steps": 9, "workers": 1, "lora": {**LORA, "export": "adapter"}}
    said = typed(command("none", write_job(folder / "later.yaml", **settings)), tmp_path)
    assert f"{folder / 'later/model'} has the weights of an earlier export; remove it" in said


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.full) for n in BACKENDS])
def test_the_backend_changes_no_loss(run: Run, folder: Path, adapted: Path, name: str) -> None:
    world, backend = BACKENDS[name]
    run(world, write_job(folder / f"lora-{name}.yaml", lora=LORA, **backend))
    assert losses(folder / f"lora-{name}") == pytest.approx(losses(adapted), rel=1e-5)


@pytest.mark.full
@pytest.mark.parametrize("first,then", [("zero2", "offload"), ("ddp", "zero3")])
def test_a_run_goes_on_elsewhere(run: Run, folder: Path, adapted: Path, first: str, then: str) -> None:
    """Stopped after its fourth step by `max_steps`, as the schedule's length is the samples' and not the job's."""
    job = folder / f"{first}-to-{then}.yaml"
    shape = {"lora": LORA, "lr_scheduler_type": "constant", "warmup_ratio": 0.0}
    run(2, write_job(folder / f"{first}-{then}-whole.yaml", **shape))
    for name, steps in ((first, 4), (then, 8)):
        world, backend = BACKENDS[name]
        run(world, write_job(job, max_steps=steps, **shape, **backend))
    wanted, found = (losses(folder / n) for n in (f"{first}-{then}-whole", job.stem))
    assert found == pytest.approx(wanted, rel=1e-5)


@pytest.mark.full
@pytest.mark.parametrize(
    "name,backend",
    [
        ("fsdp2", {}), ("fsdp2-fp32", {"bf16": False}), ("ddp", {"backend": "replicated"}),
        *((f"zero{s}", BACKENDS[f"zero{s}"][1]) for s in (2, 3)),
    ],
)  # fmt: skip
def test_a_bf16_base_is_near(run: Run, folder: Path, adapted: Path, name: str, backend: dict[str, Any]) -> None:
    job = folder / f"base-{name}.yaml"
    run(2, write_job(job, lora={**LORA, "base_dtype": "bf16"}, **{"bf16": True, **backend}))
    assert losses(folder / job.stem) == pytest.approx(losses(adapted), rel=1e-2)
    assert losses(folder / job.stem) != pytest.approx(losses(adapted), rel=1e-6)


@pytest.mark.full
def test_a_llama_of_the_configuration_and_its_embedding(run: Run, folder: Path) -> None:
    """Every linear layer but the head, with dropout: the same on two ranks and on three."""
    shape: dict[str, Any] = {"model": LLAMA, "lora": {"r": 4, "dropout": 0.2, "export": "merged"}}
    run(2, write_job(folder / "llama2.yaml", **shape))
    run(3, write_job(folder / "llama3.yaml", **shape))
    assert losses(folder / "llama2") == pytest.approx(losses(folder / "llama3"), rel=1e-5)
    assert (folder / "llama3/model/config.json").exists() and not (folder / "llama3/adapter").exists()


@pytest.mark.fast
@pytest.mark.parametrize(
    "lora,says",
    [
        ({"target_modules": ["liner"]}, "lora.target_modules: no layer is called 'liner'; did you mean 'linear'?"),
        ({"target_modules": ["0.liner"]}, "no layer is called '0.liner'; did you mean '0.linear'?"),
        ({"target_modules": ["norm"]}, "lora.target_modules=('norm',) cannot be adapted: Target module LayerNorm"),
        ({"target_modules": ["embedding"]}, "embedding is a Embedding, supported are linear layers"),
        ({"modules_to_save": ["hed"]}, "lora.modules_to_save: no layer is called 'hed'; did you mean 'head'?"),
        ({"base_dtype": "nf4"}, "lora.base_dtype=nf4 is refused: bitsandbytes' 4-bit weights need a GPU"),
        ({"rank": 4}, "unknown key 'lora.rank'; known: "),
        ({"r": 0}, "lora.r=0 must be an integer >= 1"),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_refused(ranks: Any, folder: Path, lora: dict[str, Any], says: str) -> None:
    [said] = in_ranks(ranks, 1, "refused", path=str(write_job(folder / "wrong.yaml", lora=lora)))
    assert says in said and "\n" not in said
    assert said.startswith(f"{folder}/wrong.yaml:"), said
