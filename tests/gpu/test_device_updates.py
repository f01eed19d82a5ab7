"""Update rules, torch's own kernels and averages on a device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.gpu.kinds import LIMIT, ON_CUDA, ZERO, dtype_of

pytestmark = pytest.mark.gpu
UPDATES = (
    "lars", "lamb", "muon", "adaptive_memory_sgd", "adaptive_memory_adamw", "adahessian", "sophia_h",
    "sophia_g", "sassha", "schedule_free_sgd", "schedule_free_adamw",
)  # fmt: skip


@pytest.mark.parametrize("base", ["fused", "capturable"])
@pytest.mark.parametrize("kind", ["plain", "fsdp2"])
def test_law_4_of_torchs_kernels_for_a_device(ranks: Any, tmp_path: Path, kind: str, base: str) -> None:
    if base == "capturable" and not ON_CUDA:
        pytest.skip("torch has capturable optimizers on a GPU only")
    group, case = ranks(1), "tests.cases.checkpoints.round_trip:"
    [never_stopped] = group.run(case + "save_midway", path=str(tmp_path), kind=kind, base=base)
    [continued] = group.run(case + "resume_and_finish", path=str(tmp_path), kind=kind, base=base)
    assert continued == never_stopped


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("kind", ["plain", "fsdp2", "zero2", "zero3"])
def test_updates(ranks: Any, kind: str, update: str) -> None:
    dtype = "fp32" if update == "muon" else dtype_of(kind)  # muon's own numbers are bf16
    [r] = ranks(1).run("tests.cases.updates:reference", kind=kind, update=update, dtype=dtype, clip=0.5)
    assert r["dw"] <= LIMIT[dtype], r


@pytest.mark.parametrize("kind", ["plain", "fsdp2", "zero2", "zero3"])
def test_soap(ranks: Any, kind: str) -> None:
    """Its bases are fp32; under ZeRO of short sides alone, of which the gradient has the full rank."""
    update, limit = ("soap_short", 1e-5) if kind in ZERO else ("soap", 2e-6)
    [r] = ranks(1).run("tests.cases.updates:reference", kind=kind, update=update, dtype=dtype_of(kind), units=5)
    assert r["dw"] <= limit, r


@pytest.mark.parametrize("kind", ["plain", "fsdp2"])
def test_ema(ranks: Any, kind: str) -> None:
    [r] = ranks(1).run("tests.cases.updates:followed", kind=kind, decay=0.9)
    assert r["mean"] < 1e-12 and r["loss"] < 1e-12, r


@pytest.mark.parametrize("kind", ["plain", "fsdp2", "zero2", "zero3"])
def test_swa_lawa(ranks: Any, kind: str) -> None:
    dtype = dtype_of(kind)
    [r] = ranks(1).run("tests.cases.averages:followed", kind=kind, dtype=dtype)
    for name in ("swa", "lawa"):
        assert r[name]["mean"] <= LIMIT[dtype] and r[name]["loss"] <= LIMIT[dtype] and not r[name]["back"], r
