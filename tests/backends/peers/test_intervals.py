"""Each element is shared by one rank of every replica, in one bundle per copy, in the same order on all of them."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_lsopt.backends.peers.intervals import Seat, bundles

pytestmark = pytest.mark.fast
Cuts = dict[Seat, list[tuple[int, int, int]]]


@st.composite
def jobs(draw: st.DrawFn) -> tuple[Cuts, list[int], dict[int, int]]:
    """Replicas of one to four ranks that cut parameters anywhere, or of which every rank holds all."""
    sizes = {p: draw(st.integers(1, 20)) for p in range(draw(st.integers(1, 4)))}
    cuts: Cuts = {}
    for replica in range(draw(st.integers(1, 4))):
        ranks, whole = draw(st.integers(1, 4)), draw(st.booleans())
        for rank in range(ranks):
            cuts[replica, rank] = [(p, 0, n) for p, n in sizes.items()] if whole else []
        for p, n in sizes.items() if not whole else ():
            borders = sorted({0, n, *draw(st.lists(st.integers(0, n), max_size=3))})
            for a, b in pairwise(borders):
                cuts[replica, draw(st.integers(0, ranks - 1))].append((p, a, b - a))
    return cuts, sorted({replica for replica, _ in cuts}), sizes


@settings(max_examples=150)
@given(jobs())
def test_every_element_is_shared_once_per_copy(job: tuple[Cuts, list[int], dict[int, int]]) -> None:
    cuts, members, sizes = job
    found = {seat: bundles(seat, cuts, members) for seat in cuts}
    elements: dict[tuple[Seat, ...], dict[Seat, list[tuple[int, int]]]] = {}
    for seat, own in found.items():
        for b in own:
            assert seat in b.holders and [replica for replica, _ in b.holders] == members
            listed = [
                (cuts[seat][s.piece][0], cuts[seat][s.piece][1] + at)
                for s in b.stretches for at in range(s.begin, s.end)
            ]  # fmt: skip
            assert b.numel == len(listed)
            elements.setdefault((*b.holders, (-b.copies, 0)), {})[seat] = listed
    counted: Counter[tuple[int, int]] = Counter()
    copies: dict[tuple[int, int], int] = {}
    for who, each in elements.items():
        assert {*each} == {*who[:-1]}, "all holders of a bundle know of it"
        first, *others = each.values()
        assert all(other == first for other in others), "in the same order"
        counted.update(first)
        copies |= dict.fromkeys(first, -who[-1][0])
    assert counted == {(p, i): copies[p, i] for p, n in sizes.items() for i in range(n)}


def test_alike_cuts_have_one_bundle_per_rank() -> None:
    cuts = {(replica, rank): [(0, 6 * rank, 6), (1, 3 * rank, 3)] for replica in (0, 1, 2) for rank in (0, 1)}
    [bundle] = bundles((1, 1), cuts, [0, 1, 2])
    assert bundle.holders == ((0, 1), (1, 1), (2, 1)) and bundle.numel == 9 and bundle.copies == 1


def test_ranks_that_hold_the_same_are_paired() -> None:
    """Two and three copies: three bundles, of which two have a rank of the first replica each more than once."""
    cuts = {(0, rank): [(0, 0, 4)] for rank in (0, 1)} | {(1, rank): [(0, 0, 4)] for rank in (0, 1, 2)}
    assert [b.holders for b in bundles((0, 0), cuts, [0, 1])] == [((0, 0), (1, 0)), ((0, 0), (1, 2))]
    assert all(b.copies == 3 for b in bundles((0, 0), cuts, [0, 1]))


def test_other_parameters_are_refused() -> None:
    with pytest.raises(ValueError, match="replica 1 has no elements 0 to 4 of parameter 0"):
        bundles((0, 0), {(0, 0): [(0, 0, 4)], (1, 0): [(1, 0, 4)]}, [0, 1])
