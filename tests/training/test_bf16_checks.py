"""The checks before a product with the curvature run in a bf16 job too, and find there what they find in fp32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.jobs import write_job

KINDS = {
    "autocast": (1, {"backend": "replicated"}),
    "fsdp2": (2, {"backend": "fsdp2"}),
    "zero1": (2, {"backend": "deepspeed", "deepspeed": {"zero_optimization": {"stage": 1}}}),
    "zero3": (2, {"backend": "deepspeed", "deepspeed": {"zero_optimization": {"stage": 3}}}),
}


def measured(ranks: Any, folder: Path, kind: str, steps: int = 1, **model: Any) -> dict[str, Any]:
    world, where = KINDS[kind]
    job = write_job(
        folder / f"{kind}.yaml", task="classification", dataset="digits", block_size=None, bf16=True, max_steps=200,
        model={"import": "tests.cases.probes.bf16_checks:Network", "args": model}, eval_steps=None, save_steps=None,
        per_device_train_batch_size=16, global_batch_size=64, landscape={"method": "none"}, warmup_ratio=0.0,
        probes={"lambda_max": {"every_steps": steps, "tolerance": 1e-4, "budget": 1.0}}, **where,
    )  # fmt: skip
    return ranks(world).run("tests.cases.probes.bf16_checks:measured", path=str(job), steps=steps)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_kernel_that_is_a_constant_to_autograd(ranks: Any, tmp_path: Path, kind: str) -> None:
    found = measured(ranks, tmp_path, kind, kernel="constant")
    top = found["probes"]["lambda_max"]
    assert top["relative_error"] is not None, top
    assert top["eigenvalues"][0] == pytest.approx(found["truth"], rel=1e-3)


def test_a_kernel_that_knows_no_fp64(ranks: Any, tmp_path: Path) -> None:
    found = measured(ranks, tmp_path, "autocast", kernel="narrow")
    assert found["probes"]["lambda_max"]["relative_error"] is not None


@pytest.mark.parametrize("kind", [pytest.param("fsdp2", marks=pytest.mark.full), "zero1"])
def test_what_rounding_does_is_no_fault(ranks: Any, tmp_path: Path, kind: str) -> None:
    """After 150 steps a bf16 gradient is a few hundredths of its length from the fp32 one; products are exact."""
    found = measured(ranks, tmp_path, kind, steps=150)
    top = found["probes"]["lambda_max"]
    assert top["relative_error"] is None and top["eigenvalues"][0] == pytest.approx(found["truth"], rel=1e-5)


@pytest.mark.parametrize("kind", ["fsdp2", "zero3"])
def test_a_hook_that_changes_the_model(ranks: Any, tmp_path: Path, kind: str) -> None:
    assert measured(ranks, tmp_path, kind, after=1.5)["probes"]["lambda_max"] is None
