"""Laws and contracts with models, batches and groups on a device: one rank with NCCL, two of one device by gloo."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.gpu
FRAMEWORK = ("plain", "ddp", "fsdp2")
ZERO = ("zero0", "zero1", "zero2", "zero3")
KINDS = (*FRAMEWORK, *ZERO)
OFFLOAD = ("fsdp2-offload", "zero1-offload", "zero2-offload", "zero3-offload", "zero3-offload-param")
METHODS = ("none", "sam", "asam", "lpf_sgd")
LIMIT = {"fp32": 1e-6, "fp64": 1e-12}
ON_CUDA = os.environ.get("TESTS_ON") == "cuda"


def dtype_of(kind: str) -> str:
    return "fp32" if kind in ZERO else "fp64"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_law_1_the_papers_loop(ranks: Any, kind: str, method: str) -> None:
    dtype = dtype_of(kind)
    [r] = ranks(1).run("tests.cases.laws:reference", kind=kind, method=method, dtype=dtype, last=2, clip=0.5)
    assert r["dw"] <= LIMIT[dtype] and r["dloss"] <= LIMIT[dtype], r
    assert r["passes"] == (2 if "sam" in method else 1), r


@pytest.mark.parametrize("method", ["sam", "asam", "lpf_sgd", "none"])
def test_law_1_on_two_ranks_of_one_device(ranks: Any, method: str) -> None:
    for r in ranks(2).run("tests.cases.laws:reference", kind="ddp", method=method, dtype="fp64", last=2, clip=0.5):
        assert r["dw"] <= 1e-12 and r["dloss"] <= 1e-12, r


@pytest.mark.parametrize("kind", KINDS)
def test_law_2_rest(ranks: Any, kind: str) -> None:
    [r] = ranks(1).run("tests.cases.laws:rest", kind=kind, method="sam", rest_point={"rho": 0.0})
    assert r["dw"] == 0.0 and r["passes"] == 2, r


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_law_3_back_to_the_bits(ranks: Any, kind: str, dtype: str) -> None:
    how = {"bf16": dtype == "bf16"} if kind in ZERO else {"dtype": dtype}
    [r] = ranks(1).run("tests.cases.laws:returned", kind=kind, **how)
    assert r == {"returned": True, "nested": True, "moved": True}


@pytest.mark.parametrize("kind", FRAMEWORK)
def test_law_3_after_an_exception(ranks: Any, kind: str) -> None:
    [r] = ranks(1).run("tests.cases.laws:raised", kind=kind, everywhere=True)
    assert r["back"] and r["refused"] and r["loss"] > 0


@pytest.mark.parametrize("kind", ["fsdp2", "zero2", "zero3"])
def test_law_4_saved_and_resumed(ranks: Any, tmp_path: Path, kind: str) -> None:
    group, case = ranks(1), "tests.cases.checkpoints.round_trip:"
    [never_stopped] = group.run(case + "save_midway", path=str(tmp_path), kind=kind, base="adamw")
    [continued] = group.run(case + "resume_and_finish", path=str(tmp_path), kind=kind, base="adamw")
    assert continued == never_stopped


@pytest.mark.parametrize("update", ["lars", "lamb", "muon"])
@pytest.mark.parametrize("kind", ["plain", "fsdp2", "zero2", "zero3"])
def test_updates(ranks: Any, kind: str, update: str) -> None:
    dtype = "fp32" if update == "muon" else dtype_of(kind)  # muon's own numbers are bf16
    [r] = ranks(1).run("tests.cases.updates:reference", kind=kind, update=update, dtype=dtype, clip=0.5)
    assert r["dw"] <= LIMIT[dtype], r


@pytest.mark.parametrize("kind", ["plain", "fsdp2"])
def test_ema(ranks: Any, kind: str) -> None:
    [r] = ranks(1).run("tests.cases.updates:followed", kind=kind, decay=0.9)
    assert r["mean"] < 1e-12 and r["loss"] < 1e-12, r


@pytest.mark.parametrize("kind", KINDS)
def test_the_space(ranks: Any, kind: str) -> None:
    [r] = ranks(1).run("tests.cases.contract:geometry", kind=kind)
    assert r["names"] and r["numel"], r
    assert max(r[key] for key in ("dot", "norm", "per_parameter", "per_row", "linear")) < 1e-5, r
    [r] = ranks(1).run("tests.cases.contract:moves", kind=kind)
    assert max(r.values()) < 1e-5, r


@pytest.mark.parametrize("kind", KINDS)
def test_the_oracle(ranks: Any, kind: str) -> None:
    [r] = ranks(1).run("tests.cases.oracle_contract:installed", kind=kind)
    assert r["dw"] < 1e-6 and r["norm"] < 1e-5, r
    assert ranks(1).run("tests.cases.oracle_contract:stopped", kind=kind)[0] == [False, True, True]


@pytest.mark.parametrize("kind", [*KINDS, "fsdp2-offload", "zero3-offload"])
def test_lora_laws_1_and_3(ranks: Any, kind: str) -> None:
    [r] = ranks(1).run("tests.cases.laws:reference", kind=kind, method="sam", extra=["peft"], last=2, clip=0.5)
    assert r["dw"] <= 1e-6 and r["dloss"] <= 1e-6, r
    [r] = ranks(1).run("tests.cases.laws:returned", kind=kind, extra=["peft"])
    assert r == {"returned": True, "nested": True, "moved": True}


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


@pytest.mark.parametrize("extra", [[], ["dropout"]], ids=["", "dropout"])
@pytest.mark.parametrize("kind", ["plain", "fsdp2", "zero2", "zero3"])
def test_products(ranks: Any, kind: str, extra: list[str]) -> None:
    dtype = dtype_of(kind)
    arguments = {"kind": kind, "dtype": dtype, "model": "transformer", "extra": extra, "units": 3}
    [r] = ranks(1).run("tests.cases.probes.products:products", **arguments)
    assert max(r.values()) < (1e-5 if dtype == "fp32" else 1e-11), r


@pytest.mark.parametrize("kind", KINDS)
def test_state_comes_back_from_the_host(ranks: Any, kind: str) -> None:
    [r] = ranks(1).run("tests.cases.device:back_from_the_host", kind=kind)
    assert r == {"losses": True, "weights": True}


def test_a_group_is_broken_and_formed_fifty_times(ranks: Any) -> None:
    times = 50 if ON_CUDA else 5
    [r] = ranks(1).run("tests.cases.device:broken_and_formed", times=times, timeout_s=240)
    assert r["hung"] == 0 and r["longest_s"] < 20, r
    assert r["left"][1] <= r["left"][0] + 2**20, r
