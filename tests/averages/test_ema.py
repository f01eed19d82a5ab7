"""The exponential mean of the weights: a second model's, wherever the weights lie."""

from __future__ import annotations

from typing import Any

import pytest

import elastic_lsopt as lso
from elastic_lsopt.averages.ema import EMA


@pytest.mark.parametrize("decay", [0.0, 0.9])
@pytest.mark.parametrize("kind,world", [("plain", 1), ("ddp", 2), ("fsdp2", 2), ("fsdp2", 3), ("hsdp", 4)])
def test_it_is_a_second_models(ranks: Any, kind: str, world: int, decay: float) -> None:
    for r in ranks(world).run("tests.cases.updates:followed", kind=kind, decay=decay):
        assert r["mean"] < 1e-12 and r["loss"] < 1e-12 and r["back"] == 0.0, r
        assert r["bytes"] == 1.0 and (r["moved"] > 1e-4 or not decay), r


@pytest.mark.parametrize("kind,world", [(f"zero{stage}", world) for stage in (0, 1, 2, 3) for world in (1, 2, 3)])
def test_under_zero(ranks: Any, kind: str, world: int) -> None:
    for r in ranks(world).run("tests.cases.updates:followed", kind=kind, decay=0.9, dtype="fp32"):
        assert r["mean"] < 1e-7 and r["loss"] < 1e-6 and r["back"] == 0.0, r
        assert r["bytes"] == 1.0 and r["moved"] > 1e-4, r


@pytest.mark.fast
@pytest.mark.parametrize("decay", [1.0, -0.1, "0.9", float("nan")])
def test_a_decay_out_of_range(decay: Any) -> None:
    with pytest.raises(lso.UserError, match="decay="):
        EMA(decay=decay)
