"""Micro-batches dealt by speed: the sums are those of even shares, and only where no rank waits for another's
forward."""

from __future__ import annotations

from typing import Any

import pytest

from elastic_lsopt.oracle.microbatch import slots

SHARES = [[0, 1, 3, 4, 5], [2]]
"""Five units and one; with three parts, rank 1 idles in two of them."""


@pytest.mark.parametrize(("method", "extra"), [("none", ["dropout", "unused"]), ("sam", []), ("lpf_sgd", ["dropout"])])
def test_uneven_shares_make_the_same_steps(ranks: Any, method: str, extra: list[str]) -> None:
    for r in ranks(2).run(
        "tests.cases.elastic.balanced:as_dealt_evenly", kind="ddp", method=method, shares=SHARES, extra=extra
    ):
        assert r["dw"] < 1e-6 and r["loss"] < 1e-6, r


def test_a_rank_may_have_nothing(ranks: Any) -> None:
    case = "tests.cases.elastic.balanced:as_dealt_evenly"
    for r in ranks(2).run(case, kind="ddp", method="sam", shares=[[], [0, 1, 2, 3, 4, 5]], extra=[]):
        assert r["dw"] < 1e-6 and r["loss"] < 1e-6, r


@pytest.mark.parametrize(
    ("kind", "shares"),
    [
        ("fsdp2", SHARES),  # a forward gathers: all ranks run equally many
        ("ddp", [[0, 1, 2], [2, 3, 4, 5]]),  # unit 2 twice
        ("ddp", [[0, 1], [3, 4, 5]]),  # unit 2 nowhere
        ("ddp", [[0, 1, 2, -1], [3, 4, 5]]),
    ],
    ids=["sharded", "twice", "gap", "negative"],
)
def test_other_shares_are_refused(ranks: Any, kind: str, shares: list[list[int]]) -> None:
    for said in ranks(2).run("tests.cases.elastic.balanced:refused", kind=kind, shares=shares):
        assert "got a micro-batch that is another's" in said


@pytest.mark.fast
@pytest.mark.parametrize("world", range(1, 9))
def test_slots_are_those_of_dealing_out_one_by_one(world: int) -> None:
    for first in range(6):
        for end in range(first, 20):
            hands: list[list[int | None]] = [[] for _ in range(world)]
            for u in range(first, end):
                hands[u % world].append(u)
            most = max(map(len, hands))
            for rank, hand in enumerate(hands):
                assert slots((first, end), rank, world) == hand + [None] * (most - len(hand))
