"""Laws 1 to 4, the space and the oracle with models, batches and groups on a device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.gpu.kinds import FRAMEWORK, KINDS, LIMIT, ZERO, dtype_of
from tests.laws.cover import METHODS

pytestmark = pytest.mark.gpu


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
    assert r["back"] and r["refused"] is (kind == "fsdp2") and r["loss"] > 0  # which has working copies of its own


@pytest.mark.parametrize("kind", ["fsdp2", "zero2", "zero3"])
def test_law_4_saved_and_resumed(ranks: Any, tmp_path: Path, kind: str) -> None:
    group, case = ranks(1), "tests.cases.checkpoints.round_trip:"
    [never_stopped] = group.run(case + "save_midway", path=str(tmp_path), kind=kind, base="adamw")
    [continued] = group.run(case + "resume_and_finish", path=str(tmp_path), kind=kind, base="adamw")
    assert continued == never_stopped


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
