"""Law 3: back to the very bits after a perturbation, after an exception, after another rank's failure."""

from __future__ import annotations

from typing import Any

import pytest

KINDS = [("plain", 1), ("ddp", 2), ("fsdp2", 2), ("fsdp2-kept", 3), ("hsdp", 4)]


@pytest.mark.parametrize("kind,world", KINDS[:3])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_bits_after_displacement(ranks: Any, kind: str, world: int, dtype: str) -> None:
    for r in ranks(world).run("tests.cases.laws:returned", kind=kind, dtype=dtype):
        assert r == {"returned": True, "nested": True, "moved": True}


@pytest.mark.parametrize("kind,world", KINDS[3:])
def test_bits_after_displacement_on_larger_worlds(ranks: Any, kind: str, world: int) -> None:
    for r in ranks(world).run("tests.cases.laws:returned", kind=kind):
        assert r == {"returned": True, "nested": True, "moved": True}


@pytest.mark.fast
@pytest.mark.parametrize("kind,world", KINDS[:4])
def test_all_ranks_raise_alike(ranks: Any, kind: str, world: int) -> None:
    for r in ranks(world).run("tests.cases.laws:raised", kind=kind, everywhere=True):
        assert r["back"] and r["refused"] is (kind != "plain") and r["loss"] > 0  # which has no other copy


@pytest.mark.parametrize("kind,world", [("ddp", 2), ("fsdp2", 2), ("fsdp2", 3), ("hsdp", 4)])
@pytest.mark.parametrize(
    "where", [pytest.param("before the forward", marks=pytest.mark.full), "in the forward", "after the forward"]
)
def test_one_rank_raises_in_a_displaced_pass(kind: str, world: int, where: str) -> None:
    """A group of its own: the failure cuts the transport for good."""
    from tests.processes.ranks import Ranks

    group = Ranks(world)
    try:
        out = group.run("tests.cases.failure:one_rank_raises", kind=kind, where=where, timeout_s=60)
    finally:
        group.stop()
    for rank, r in enumerate(out):
        assert r["seconds"] < 30, r
        assert "oh dear" in r["error"], r
        assert (r["kind"] == "ValueError") == (rank == 1), r
        assert r["own_back"] and r["refused"] and r["settled"] and r["goes_on"] == "PeerFailed", r
