"""Products with the curvature on a device; host memory's versions of it; groups of NCCL, broken and formed."""

from __future__ import annotations

from typing import Any

import pytest

from tests.gpu.kinds import KINDS, ON_CUDA, dtype_of

pytestmark = pytest.mark.gpu


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
