"""Breadth-first search of small worlds: every order of reads, losses, delays, failures and time, up to a depth.

A read takes the newest of a writer's records or the one before (delay); what is overwritten or never read is lost; each
delivery is done twice (World.deliver). Time moves by half a lease for all. The worlds are told apart by World.key.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import pytest

from elastic_lsopt.elastic import leader, membership
from elastic_lsopt.elastic.record import Rules
from tests.elastic.model import Advance, Violation, World, begin, deliveries

RULES = Rules(min_nodes=1, max_nodes=4, job="j", fingerprint={}, lease_s=2.0, join_debounce_s=0.0)
STEP_S = RULES.lease_s / 2


Steps = Callable[[World, "Left", Advance], Iterator[tuple[World, "Left"]]]


@dataclass(frozen=True)
class Left:
    """What may still happen."""

    failures: int
    ticks: int
    depth: int


def rounds(world: World, left: Left, advance: Advance) -> Iterator[tuple[World, Left]]:
    """Coarser and so deeper: half a lease passes, one agent is cut off or none, all other records are read."""
    deeper = replace(left, depth=left.depth - 1)
    for cut in ("", *(p.name for p in world.places)):
        then = world.tick(STEP_S, advance)
        for _ in range(8):
            for writer, reader in [link for link, _ in then.mail if cut not in link]:
                records = dict(then.mail).get((writer, reader))
                if records:
                    then = then.deliver(writer, reader, len(records) - 1, advance)
        yield then, deeper
    for place in world.places:
        if left.failures and place.state:
            yield world.crash(place.name), replace(left, failures=left.failures - 1)
        if place.state is None and place.disk:
            yield world.restart(place.name, advance), deeper


def following(world: World, left: Left, advance: Advance) -> Iterator[tuple[World, Left]]:
    deeper = replace(left, depth=left.depth - 1)
    for writer, reader, index in deliveries(world):
        yield world.deliver(writer, reader, index, advance), deeper
    if left.ticks:
        yield world.tick(STEP_S, advance), replace(deeper, ticks=left.ticks - 1)
    for place in world.places:
        if left.failures and place.state:
            failed = replace(deeper, failures=left.failures - 1)
            yield world.crash(place.name), failed
            if place.alive:
                yield world.kill_worker(place.name, advance), failed
        if place.state is None and place.disk:
            yield world.restart(place.name, advance), deeper


def search(world: World, left: Left, advance: Advance = membership.advance, steps: Steps = following) -> int:
    """Visit every world within `left`; the number of different ones. Raises Violation."""
    world = replace(world, mail=(), decided=world.decided[-1:])
    seen = {(world.key(), left.failures, left.ticks)}
    level = [(world, left)]
    while level:
        below = []
        for at, still in level:
            for then, rest in steps(at, still, advance):
                key = (then.key(), rest.failures, rest.ticks)
                if rest.depth and key not in seen:
                    seen.add(key)
                    below.append((then, rest))
        level = below
    return len(seen)


full = pytest.mark.full


@pytest.mark.parametrize(
    ("agents", "left", "steps"),
    [
        (2, Left(failures=2, ticks=2, depth=4), following),
        (3, Left(failures=2, ticks=1, depth=3), following),
        (2, Left(failures=2, ticks=0, depth=6), rounds),
        (3, Left(failures=1, ticks=0, depth=3), rounds),
        (4, Left(failures=1, ticks=0, depth=2), rounds),
        pytest.param(2, Left(failures=2, ticks=6, depth=12), following, marks=full),
        pytest.param(3, Left(failures=2, ticks=3, depth=6), following, marks=full),
        pytest.param(4, Left(failures=2, ticks=2, depth=5), following, marks=full),
        pytest.param(3, Left(failures=2, ticks=0, depth=9), rounds, marks=full),
        pytest.param(4, Left(failures=2, ticks=0, depth=8), rounds, marks=full),
    ],
)
@pytest.mark.timeout(3600)
def test_no_violation_is_found(agents: int, left: Left, steps: Steps) -> None:
    visited = search(begin(agents, RULES), left, steps=steps)
    print(f"{agents} agents, {steps.__name__}, {left}: {visited} states")
    assert visited > 30


class NoWait(Rules):
    """Evicts without waiting for leases to end."""

    @property
    def evict_s(self) -> float:
        return 0.0


def test_a_quorum_of_half_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    world = begin(2, RULES)
    monkeypatch.setattr(leader, "decides", lambda members, votes, tie: 2 * votes >= members)
    with pytest.raises(Violation, match=r"two generations|alive"):
        search(world, Left(failures=0, ticks=0, depth=9), steps=rounds)


def test_eviction_without_a_wait_is_caught() -> None:
    hasty = NoWait(min_nodes=1, max_nodes=4, job="j", fingerprint={}, lease_s=2.0, join_debounce_s=0.0)
    world = begin(3, RULES)
    places = tuple(replace(p, state=replace(p.state, rules=hasty)) for p in world.places if p.state)
    with pytest.raises(Violation, match="alive"):
        search(replace(world, places=places, rules=hasty), Left(failures=0, ticks=0, depth=6), steps=rounds)
