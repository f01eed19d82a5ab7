"""The gain is the same number wherever the pieces of the gradient lie, and its Vector is 1/N a rank."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.mark.parametrize("kind", ["fsdp2", "zero2", "zero3"])
def test_any_sharding_measures_the_gain_of_one_process(ranks: Any, kind: str) -> None:
    [(variance, square, whole)] = ranks(1).run("tests.cases.elastic.gain:gain_of", kind="plain")
    got = ranks(2).run("tests.cases.elastic.gain:gain_of", kind=kind)
    for v, s, _ in got:
        assert (v, s) == pytest.approx((variance, square), rel=1e-4)
    assert sum(held for *_, held in got) == whole and variance > 0
