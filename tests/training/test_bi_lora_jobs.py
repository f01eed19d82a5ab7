"""Jobs with `landscape: {method: bi_lora}`: the same losses on every backend, in an elastic job and resumed elsewhere;
probes and exports without the second adapter."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.jobs import BIN, TINY, Run, Started, command, losses, rows, write_job
from tests.jobs import run as typed

pytestmark = [pytest.mark.full, pytest.mark.timeout(400)]
MEASURES = {name: {"every_steps": 4, "units": 2, "budget": 1.0} for name in ("lambda_max", "gradient_norm")}
SHAPE: dict[str, Any] = {
    "lora": {"r": 4, "alpha": 8, "target_modules": ["linear"], "export": "both"},
    "landscape": {"method": "bi_lora", "r": 3, "rho": 0.02},
    "lr_scheduler_type": "constant", "warmup_ratio": 0.0,
}  # fmt: skip
BACKENDS: dict[str, tuple[int, dict[str, Any]]] = {
    "ddp": (3, {"backend": "replicated"}),
    "offload": (3, {"fsdp_cpu_offload": True}),
    **{f"zero{s}": (2, {"backend": "deepspeed", "deepspeed": {"zero_optimization": {"stage": s}}}) for s in range(4)},
}


@pytest.fixture(scope="module")
def against(run: Run, folder: Path) -> Path:
    """The run folder of eight steps, FSDP2 on two ranks."""
    run(2, write_job(folder / "against.yaml", probes=MEASURES, averages={"ema": {"decay": 0.9}}, **SHAPE))
    return folder / "against"


@pytest.mark.parametrize("kind", BACKENDS)
def test_the_backend_changes_no_loss_of_bi_lora(run: Run, folder: Path, against: Path, kind: str) -> None:
    world, backend = BACKENDS[kind]
    run(world, write_job(folder / f"against-{kind}.yaml", probes=MEASURES, **SHAPE, **backend))
    found, wanted = rows(folder / f"against-{kind}"), rows(against)
    assert losses(folder / f"against-{kind}") == pytest.approx(losses(against), rel=1e-5)
    for step in (4, 8):
        assert found[step]["eval_loss"] == pytest.approx(wanted[step]["eval_loss"], rel=1e-5)
        ours, theirs = found[step]["probes"], wanted[step]["probes"]
        assert ours["gradient_norm"]["norms"] == pytest.approx(theirs["gradient_norm"]["norms"], rel=1e-3, abs=1e-6)
        assert not any("adversary" in name for name in ours["gradient_norm"]["norms"])
        sharp = [told["lambda_max"]["eigenvalues"] for told in (ours, theirs)]
        assert sharp[0] == pytest.approx(sharp[1], rel=5e-3)


@pytest.mark.parametrize("first,then", [("zero2", "offload"), ("ddp", "zero3")])
def test_a_run_of_bi_lora_goes_on_elsewhere(run: Run, folder: Path, against: Path, first: str, then: str) -> None:
    job = folder / f"against-{first}-{then}.yaml"
    for name, steps in ((first, 4), (then, 8)):
        world, backend = BACKENDS[name]
        run(world, write_job(job, max_steps=steps, **SHAPE, **backend))
    assert losses(folder / job.stem) == pytest.approx(losses(against), rel=1e-5)


def test_what_a_job_of_bi_lora_leaves_is_lora(against: Path) -> None:
    kept = load_file(against / "adapter/adapter_model.safetensors")
    merged = load_file(against / "model/model.safetensors")
    assert kept and {t.shape[0] if "lora_A" in name else t.shape[1] for name, t in kept.items()} == {4}
    assert not any("adversary" in name for name in [*kept, *merged])
    config = json.loads((against / "adapter/adapter_config.json").read_text())
    assert config["r"] == 4


def test_the_finished_run_of_bi_lora_has_the_measures_of_the_job(against: Path, tmp_path: Path) -> None:
    """The same batches, at the model without its adversary; of the average too."""
    asked = ["--measures", "lambda_max,gradient_norm", "--units", "2", "--trust", "--output", str(tmp_path)]
    typed([str(BIN / "elastic-lsopt"), "probe", str(against), *asked], tmp_path)
    told = json.loads((tmp_path / "probe-1/probes.json").read_text())["probes"]
    wanted = rows(against)[8]["probes"]
    for name, norm in wanted["gradient_norm"]["norms"].items():
        assert told["gradient_norm"]["norms"][name] == pytest.approx(norm, rel=1e-3, abs=1e-6)
    assert told["gradient_norm"]["norms"].keys() == wanted["gradient_norm"]["norms"].keys()
    assert told["lambda_max"]["eigenvalues"] == pytest.approx(wanted["lambda_max"]["eigenvalues"], rel=5e-3)
    typed([str(BIN / "elastic-lsopt"), "probe", str(against), *asked, "--average", "ema"], tmp_path)


def test_an_elastic_job_of_bi_lora_has_the_undisturbed_losses(run: Run, folder: Path, tmp_path: Path) -> None:
    """One of three workers is killed, and another takes its place."""
    steps = {"max_steps": 40, "eval_steps": 20, "workers": 3, **SHAPE}
    run(2, write_job(folder / "undisturbed.yaml", **steps))
    slow = {"import": TINY, "args": {"pause_s": 0.02}}
    started = Started(command("none", write_job(tmp_path / "killed.yaml", model=slow, elastic={}, **steps)), tmp_path)
    started.until(lambda: len(rows(tmp_path / "killed")) >= 8)
    os.kill(next(iter(started.named_workers().values())), signal.SIGKILL)
    assert started.wait() == 0, started.output
    found, wanted = rows(tmp_path / "killed"), rows(folder / "undisturbed")
    assert losses(tmp_path / "killed") == pytest.approx(losses(folder / "undisturbed"), rel=1e-5)
    assert found[40]["eval_loss"] == pytest.approx(wanted[40]["eval_loss"], rel=1e-5)
    assert {row["world"] for row in found.values()} >= {2, 3}
