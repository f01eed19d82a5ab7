"""Displaced weights equal plain ones: any scale, any direction, any sharding; what is reported of them is true."""

from __future__ import annotations

from typing import Any

import pytest

from tests.laws.cover import daily_of

KINDS = ("ddp", "fsdp2", "fsdp2-kept", "hsdp")
CASES = [(k, world, bf16) for k in KINDS for world in (1, 2, 3, 4) for bf16 in (False, True) if k != "ddp" or not bf16]


@pytest.mark.parametrize("kind,world,bf16", daily_of(CASES, fast=lambda kind, world, bf16: world == 2 and not bf16))
def test_moves(ranks: Any, kind: str, world: int, bf16: bool) -> None:
    """The noise is that of the whole parameter, bit for bit; row-scaled moves are those of a plain loop over rows."""
    for r in ranks(world).run("tests.cases.contract:moves", kind=kind, bf16=bf16):
        assert r.pop("noise") == 0.0, r
        assert r.pop("back") == 0.0, r
        assert max(r.values()) < 1e-6, r


@pytest.mark.parametrize(
    "kind,world,bf16,length",
    [("ddp", 2, False, 0.05), ("fsdp2", 3, False, 0.05), ("fsdp2", 2, True, 0.3), ("hsdp", 4, True, 0.3)],
)
def test_fidelity_of_a_displacement_that_survives(ranks: Any, kind: str, world: int, bf16: bool, length: float) -> None:
    for r in ranks(world).run("tests.cases.contract:fidelity", kind=kind, bf16=bf16, length=length):
        assert r["cosine"] > 0.95, r
        assert abs(r["asked"] - length) < 1e-6, r
        assert abs(r["cosine"] - r["plain cosine"]) < 1e-4 and abs(r["ratio"] - r["plain ratio"]) < 1e-4, r


@pytest.mark.parametrize("kind,world", [("fsdp2", 2), ("fsdp2", 3)])
def test_fidelity_of_a_displacement_lost_in_bf16(ranks: Any, kind: str, world: int) -> None:
    for r in ranks(world).run("tests.cases.contract:fidelity", kind=kind, bf16=True, length=1e-3):
        assert r["cosine"] < 0.7 and r["ratio"] > 1.3, r
        assert abs(r["cosine"] - r["plain cosine"]) < 1e-3 and abs(r["ratio"] - r["plain ratio"]) < 1e-3, r
