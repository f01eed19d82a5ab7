"""One replica's place in the ledger: what its loader gives out is what the ledger counts, also when others took it."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest

from elastic_lsopt.data.ledger import Ledger, Span, first
from elastic_lsopt.data.rounds import RoundLoader, Rounds

pytestmark = pytest.mark.fast
PACES = {0: 1.0, 1: 1.0}


def loader_of(rounds: Rounds, batch: int, total: int) -> RoundLoader:
    samples: Any = range(1000)
    return RoundLoader(
        samples, list, rounds, replicas=2, global_batch_size=batch, microbatch_size=1, seed=0, rank=0,
        world=1, total_samples=total,
    )  # fmt: skip


@pytest.mark.parametrize("left", [400, 0])
def test_a_replica_that_others_have_taken_for_lost_trains_on_what_it_is_dealt_then(left: int) -> None:
    """The step that it was given out is not taken, and none that was read ahead of it: of what it has in hand now no
    sample is passed over, and none comes twice. `left`: samples that the job still has for it."""
    batch, total = 4, 440
    rounds = Rounds(Ledger.begun(total, batch, {0: 4, 1: 4}), 1, 2, PACES)
    loader, trained, passed_over = loader_of(rounds, batch, total), [], False
    for turn, step in enumerate(loader):
        if turn == 2:  # the others have met without it three times: its samples are theirs
            ledger = replace(rounds.ledger.lost(1), next=total - left, returned=())
            rounds.settle(ledger, counted={0: 0, 1: 0}, beyond={}, undone={}, paces=PACES)
            loader.take_back()
            passed_over = True
            continue
        if passed_over:
            trained += [row for unit in step for row in unit.batch]
        loader.commit(batch)
        rounds.advance(batch)
    dealt = [p for begin, end in rounds.ledger.open.get(1, ()) for p in range(begin, end)]
    assert trained == [int(i) for i in loader.source.order.at(dealt)] if dealt else not trained
    assert bool(dealt) == bool(left)


@pytest.mark.parametrize("total", range(21, 100, 3))
def test_a_job_that_is_to_end_sooner_than_it_has_dealt_counts_no_sample_twice(total: int) -> None:
    """The ledger of 100 samples, of which 44 are dealt and 24 counted, goes on as one of `total`."""

    def positions(spans: tuple[Span, ...]) -> list[int]:
        return [p for begin, end in spans for p in range(begin, end)]

    draw, wanted = random.Random(total), {0: 5, 1: 5}
    ledger = Ledger.begun(100, 4, wanted).counted({0: 12, 1: 12}).met([0, 1]).dealt(wanted).until(total)
    counted, seen = ledger.committed, list[int]()
    for _ in range(100):
        if ledger.ended:
            break
        now = {r: min(4 * draw.randint(0, 3), ledger.held(r)) for r in (0, 1)}
        seen += [p for r, n in now.items() for p in positions(first(ledger.open.get(r, ()), n))]
        ledger = ledger.counted(now).met([0, 1]).dealt(wanted)
    assert ledger.ended and ledger.committed == counted + len(seen)
    assert len(seen) == len(set(seen)) and max(seen, default=0) < total
