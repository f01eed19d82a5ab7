"""State that survives a change of members: groups torn down and formed again, and every number where it belongs."""

from __future__ import annotations

from typing import Any

import pytest

CASES = "tests.cases.elastic_state:"
KINDS = ("ddp", "fsdp2", "hsdp", "zero0", "zero1", "zero2", "zero3")


@pytest.mark.parametrize("sever", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_an_engine_is_rebuilt_at_another_world_size_in_the_same_processes(ranks: Any, kind: str, sever: bool) -> None:
    out = ranks(3).run(CASES + "rebuild", kind=kind, worlds=[1, 2, 3, 2, 1], sever=sever)
    alone = out[0]["losses"][0]
    for rank, r in enumerate(out):
        assert len(r["losses"]) == 5 - 2 * rank
        for losses in r["losses"]:
            assert losses == pytest.approx(alone, rel=1e-6), f"rank {rank}"
        assert r["left"] == 0, f"rank {rank}: {r['left']} bytes were not freed"
