"""Lengths and angles equal those of plain whole tensors, whatever the sharding, by one all-reduce each."""

from __future__ import annotations

from typing import Any

import pytest

KINDS = ("ddp", "fsdp2", "fsdp2-kept", "hsdp")
CASES = [(k, world, bf16) for k in KINDS for world in (1, 2, 3, 4) for bf16 in (False, True) if k != "ddp" or not bf16]


@pytest.mark.parametrize(
    "kind,world,bf16", [pytest.param(*c, marks=pytest.mark.fast if c[1:] == (2, False) else ()) for c in CASES]
)
def test_reductions(ranks: Any, kind: str, world: int, bf16: bool) -> None:
    """A parameter of one element and one of three rows leave some ranks without a piece at worlds 2 to 4."""
    out = ranks(world).run("tests.cases.contract:geometry", kind=kind, bf16=bf16)
    for r in out:
        assert r["names"] and r["numel"], r
        assert r["dot"] < 1e-6, r
        assert max(r["norm"], r["per_parameter"], r["per_row"]) < 1e-12, r
        assert r["linear"] < 1e-6, r
        assert r["collectives"] == [int(r["sharded_over"] > 1)] * 4, r
    if kind.startswith("fsdp2") and world > 2:
        assert len({r["pieces"] for r in out}) > 1, "no rank was without a piece"


@pytest.mark.fast
@pytest.mark.parametrize("kind,world", [("ddp", 2), ("fsdp2", 2)])
def test_an_older_generation_is_refused(ranks: Any, kind: str, world: int) -> None:
    for r in ranks(world).run("tests.cases.contract:retired", kind=kind):
        assert set(r.values()) == {"StaleGeneration"}, r
