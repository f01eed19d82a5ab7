"""Each sample is dealt to one replica at a time and counted once, whoever comes, is late or is lost."""

from __future__ import annotations

import random

import pytest

from elastic_lsopt.data.ledger import MISSES, Ledger, first, length, rest, shared_out

pytestmark = pytest.mark.fast


def positions(spans: tuple[tuple[int, int], ...]) -> list[int]:
    return [p for begin, end in spans for p in range(begin, end)]


def test_replicas_that_meet_at_every_step_train_together_on_what_one_job_would_have() -> None:
    """Replicas of batch 3, which meet at every step: step t of both is positions 6t to 6t + 5."""
    wanted, seen = {0: 3, 1: 3}, {0: [], 1: []}  # one until the next exchange, two ahead
    ledger = Ledger.begun(60, 3, wanted)
    for step in range(10):
        for r in (0, 1):
            seen[r].append(positions(first(ledger.open[r], 3)))
        assert sorted(seen[0][step] + seen[1][step]) == list(range(6 * step, 6 * step + 6))
        ledger = ledger.counted({0: 3, 1: 3}).met([0, 1]).dealt(wanted)
    assert ledger.ended and not ledger.open


@pytest.mark.parametrize("seed", range(60))
def test_each_sample_counts_once(seed: int) -> None:
    """Random paces, sizes, absences and losses; a plain list of what was trained says what has counted."""
    draw = random.Random(seed)
    replicas, batch, total = draw.randint(1, 5), draw.randint(1, 4), draw.randint(1, 200)
    pace = {r: draw.randint(1, 6) for r in range(replicas)}
    ledger = Ledger.begun(total, batch, {r: n + 2 for r, n in pace.items()})
    trained: dict[int, int] = dict.fromkeys(range(replicas), 0)
    counted: list[int] = []
    for _ in range(2000):
        held = [p for spans in ledger.open.values() for p in positions(spans)] + positions(ledger.returned)
        assert sorted(held + counted + list(range(ledger.next, total))) == list(range(total))
        if ledger.ended:
            break
        for r in range(replicas):
            more = min(pace[r] * batch, ledger.held(r) - trained[r]) if draw.random() < 0.9 else 0
            trained[r] += max(0, more)
        there = [r for r in range(replicas) if draw.random() < 0.7] or [0]
        well = draw.random() < 0.8
        if well:
            counted += [p for r in there for p in positions(first(ledger.open.get(r, ()), trained[r]))]
            ledger = ledger.counted({r: trained[r] for r in there})
            trained.update(dict.fromkeys(there, 0))
        before = dict(ledger.open)
        ledger = ledger.met(there)
        for r in set(before) - set(ledger.open):
            trained[r] = 0  # it was lost: what it did does not count
        if draw.random() < 0.05:
            gone = draw.randrange(replicas)
            ledger, trained[gone] = ledger.lost(gone), 0
        ledger = ledger.dealt({r: pace[r] + 2 for r in there}, {r: trained[r] for r in there})
        ledger = Ledger.from_json(ledger.to_json())
    assert ledger.ended and sorted(counted) == list(range(total))


def test_who_misses_three_exchanges_is_lost_and_others_train_on_what_it_had() -> None:
    ledger = Ledger.begun(100, 5, {0: 3, 1: 3})
    had = ledger.open[1]
    for turn in range(MISSES):
        assert ledger.open.get(1, ()) == had and ledger.missed.get(1, 0) == turn
        ledger = ledger.counted({0: 5}).met([0])
    assert 1 not in ledger.open and ledger.returned == ((5, 10), (15, 20), (25, 30))
    ledger = ledger.dealt({0: 5})
    assert set(positions(ledger.open[0])) >= set(positions(had))


def test_who_comes_back_begins_to_count_anew() -> None:
    ledger = Ledger.begun(100, 5, {0: 3, 1: 3}).met([0]).met([0])
    assert ledger.missed == {1: 2} and ledger.met([0, 1]).missed == {}


def test_the_last_batches_are_shared_in_proportion() -> None:
    assert shared_out(10, {0: 2, 1: 3}) == {0: 2, 1: 3}
    assert shared_out(5, {0: 4, 1: 4, 2: 2}) == {0: 2, 1: 2, 2: 1}
    assert shared_out(1, {0: 4, 1: 4}) == {0: 1, 1: 0}
    assert sum(shared_out(7, {0: 5, 1: 9, 2: 3}).values()) == 7


def test_first_and_rest_part_the_spans() -> None:
    spans = ((0, 3), (10, 12), (20, 25))
    for n in range(12):
        assert positions(first(spans, n)) + positions(rest(spans, n)) == positions(spans)
        assert length(first(spans, n)) == min(n, 10)
