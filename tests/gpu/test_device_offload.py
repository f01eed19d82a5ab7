"""What is offloaded lies on the host, computes on the device, and is under the same laws."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.gpu.kinds import OFFLOAD, ON_CUDA
from tests.laws.cover import METHODS

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("kind", [*OFFLOAD, "zero3-offload-weights"])
def test_what_is_offloaded_is_on_the_host(ranks: Any, kind: str, bf16: bool) -> None:
    [r] = ranks(1).run("tests.cases.offload:places", kind=kind, bf16=bf16)
    device = "cuda" if ON_CUDA else "cpu"
    weights = "cpu" if "fsdp2" in kind or "param" in kind or "weights" in kind else device
    rest = device if "weights" in kind else "cpu"
    assert r == {
        "compute": device, "working": weights, "masters": rest, "gradient": rest, "momentum": rest, "vector": rest,
    }  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", [*OFFLOAD, "zero3-offload-weights"])
def test_offload_law_1(ranks: Any, kind: str, method: str) -> None:
    [r] = ranks(1).run("tests.cases.laws:reference", kind=kind, method=method, last=2, units=5, clip=0.5)
    assert r["dw"] <= 1e-6 and r["dloss"] <= 1e-6, r


@pytest.mark.parametrize("kind", OFFLOAD)
def test_offload_laws_1_to_4(ranks: Any, tmp_path: Path, kind: str) -> None:
    [dw] = ranks(1).run("tests.cases.offload:branches_in_turn", kind=kind, method="sam")
    assert dw <= 1e-6
    [r] = ranks(1).run("tests.cases.laws:rest", kind=kind, method="sam", rest_point={"rho": 0.0})
    assert r["dw"] == 0.0 and r["passes"] == 2, r
    for bf16 in (False, True):
        [r] = ranks(1).run("tests.cases.laws:returned", kind=kind, bf16=bf16)
        assert r == {"returned": True, "nested": True, "moved": True}
    group, case = ranks(1), "tests.cases.checkpoints.round_trip:"
    [never_stopped] = group.run(case + "save_midway", path=str(tmp_path), kind=kind, base="adamw")
    [continued] = group.run(case + "resume_and_finish", path=str(tmp_path), kind=kind, base="adamw")
    assert continued == never_stopped


@pytest.mark.parametrize("kind", OFFLOAD)
def test_offload_under_updates_and_products(ranks: Any, kind: str) -> None:
    for update in ("lars", "muon"):
        [r] = ranks(1).run("tests.cases.updates:reference", kind=kind, update=update, dtype="fp32", clip=0.5)
        assert r["dw"] <= 1e-6, r
    arguments = {"kind": kind, "dtype": "fp32", "model": "transformer", "extra": [], "units": 3}
    [r] = ranks(1).run("tests.cases.probes.products:products", **arguments)
    assert max(r.values()) < 1e-5, r
    [r] = ranks(1).run("tests.cases.device:back_from_the_host", kind=kind)
    assert r == {"losses": True, "weights": True}
