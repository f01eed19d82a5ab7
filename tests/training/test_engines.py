"""Engines from settings: every backend computes the same job, in bfloat16 about the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.jobs import Run, in_ranks, losses, write_job


def zero(stage: int, **more: Any) -> dict[str, Any]:
    return {"backend": "deepspeed", "deepspeed": {"zero_optimization": {"stage": stage, **more}}}


BACKENDS: dict[str, dict[str, Any]] = {
    "ddp": {"backend": "replicated"},
    "hsdp": {"fsdp_replicas": 2},
    "kept": {"fsdp_reshard_after_forward": False},
    "fsdp2-offload": {"fsdp_cpu_offload": True},
    "zero0": zero(0),
    "zero1": zero(1),
    "zero2": zero(2),
    "zero2-offload": zero(2, offload_optimizer={"device": "cpu"}),
    "zero3-offload": zero(3, offload_optimizer={"device": "cpu"}, offload_param={"device": "cpu"}),
}
OFFLOADED = [pytest.param(name, marks=pytest.mark.full) if "offload" in name else name for name in BACKENDS]


@pytest.mark.parametrize("name", OFFLOADED)
def test_the_backend_changes_no_loss(run: Run, folder: Path, whole: Path, name: str) -> None:
    """With clipping, warm-up, momentum and a weight decay of matrices alone; zero3: see test_loop.py."""
    run(2, write_job(folder / f"{name}.yaml", **BACKENDS[name]))
    assert losses(folder / name) == pytest.approx(losses(whole), rel=1e-5)


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "zero1", "zero3"])
def test_bfloat16_is_near(run: Run, folder: Path, whole: Path, name: str) -> None:
    """Eight bits of mantissa in each forward: losses of about 5.5 to a relative 1e-2, but not the same."""
    settings = {"fsdp2": {}, "zero3": zero(3)} | BACKENDS
    run(2, write_job(folder / f"bf16-{name}.yaml", bf16=True, **settings[name]))
    assert losses(folder / f"bf16-{name}") == pytest.approx(losses(whole), rel=1e-2)
    assert losses(folder / f"bf16-{name}") != pytest.approx(losses(whole), rel=1e-6)


def test_checkpointed_activations_change_nothing_with_dropout(run: Run, folder: Path, whole: Path) -> None:
    model = {"import": "tests.cases.elastic.job_models:TinyLM", "args": {"dropout": 0.3}}
    run(2, write_job(folder / "dropout.yaml", model=model))
    run(2, write_job(folder / "recomputed.yaml", model=model, activation_checkpointing=True))
    assert losses(folder / "recomputed") == pytest.approx(losses(folder / "dropout"), rel=1e-6)
    assert losses(folder / "dropout") != pytest.approx(losses(whole), rel=1e-3)


@pytest.mark.fast
@pytest.mark.parametrize("backend", ["replicated", "fsdp2"])
def test_weight_decay_leaves_vectors_alone(ranks: Any, folder: Path, backend: str) -> None:
    job = write_job(folder / "groups.yaml", backend=backend)
    (matrix_decay, matrices), (vector_decay, vectors) = in_ranks(ranks, 1, "decayed", path=str(job))[0]
    assert (matrix_decay, vector_decay) == (0.01, 0.0)
    assert matrices == ["blocks.0.linear.weight", "blocks.1.linear.weight", "embedding.weight", "head.weight"]
    assert vectors == [
        "blocks.0.linear.bias", "blocks.0.norm.bias", "blocks.0.norm.weight",
        "blocks.1.linear.bias", "blocks.1.norm.bias", "blocks.1.norm.weight", "head.bias",
    ]  # fmt: skip


def test_replica_groups_that_do_not_divide_the_ranks_are_refused(ranks: Any, folder: Path) -> None:
    job = write_job(folder / "odd.yaml", fsdp_replicas=2)
    for said in in_ranks(ranks, 3, "refused", path=str(job)):
        assert "fsdp_replicas=2" in said
        assert "3 ranks" in said
