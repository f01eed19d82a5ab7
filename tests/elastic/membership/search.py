"""Breadth-first search of worlds: what is worked out once is remembered, so that a step costs a few dict look-ups.

Agents are few and their states repeat from world to world, so `Memory` gives each state and record that it has seen one
identity, and the answer of `advance` to each (state, event, time) is computed once.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from elastic_lsopt.elastic.membership import machine as membership
from elastic_lsopt.elastic.membership.record import Effect, Event, Heard
from elastic_lsopt.elastic.membership.state import State
from tests.elastic.membership.model import Advance, World, deliveries, form


@dataclass(frozen=True)
class Left:
    """What may still happen."""

    depth: int
    failures: int = 0
    """Crashes of agents and deaths of workers."""
    ticks: int = 0
    losses: int = 0
    """Rounds in which an agent, or one direction of a link, is cut off."""


Steps = Callable[[World, Left, Advance], Iterator[tuple[World, Left]]]


class Memory:
    """`advance` with each answer computed once, and keys of worlds made of small numbers."""

    def __init__(self, advance: Advance = membership.advance) -> None:
        self._advance = advance
        self._answers: dict[tuple[int, Hashable, float, bool], tuple[State, tuple[Effect, ...]]] = {}
        self._forms: dict[tuple[int, float], int] = {}
        self._numbers: dict[Hashable, int] = {}
        self._kept: list[Any] = []
        """Whose identities are keys here must not be freed."""

    def advance(
        self, state: State, event: Event, now: float, *, may_vote: bool = True
    ) -> tuple[State, tuple[Effect, ...]]:
        heard = tuple(map(id, event.records)) if isinstance(event, Heard) else event
        asked = (id(state), heard, now, may_vote)
        if asked not in self._answers:
            self._kept += [state, event]
            more = {} if may_vote else {"may_vote": False}
            self._answers[asked] = self._advance(state, event, now, **more)
        return self._answers[asked]

    def key(self, world: World) -> Hashable:
        """Equal for worlds that behave alike: see `form`."""
        now = world.places[0].clock_s
        return (
            tuple(
                (self._number(p.state, now, world), self._number(p.disk, now, world), p.alive, p.entered)
                for p in world.places
            ),
            tuple((link, tuple(self._number(r, now, world) for r in records)) for link, records in world.mail),
            self._number(world.witness, now, world),
        )

    def _number(self, value: Any, now: float, world: World) -> int:
        at = (id(value), now)
        if at not in self._forms:
            self._kept.append(value)
            shape = form(value, now, -(world.rules.evict_s + 1))
            self._forms[at] = self._numbers.setdefault(shape, len(self._numbers))
        return self._forms[at]


def search(start: World, left: Left, steps: Steps, advance: Advance = membership.advance) -> int:
    """Visit every world within `left`; the number of different ones. Raises Violation."""
    memory = Memory(advance)
    first = replace(start, mail=start.mail, decided=start.decided[-1:])
    seen: dict[Hashable, None] = {(memory.key(first), left.failures, left.ticks, left.losses): None}
    level = [(first, left)]
    while level:
        below = []
        for at, still in level:
            for then, rest in steps(at, still, memory.advance):
                key = (memory.key(then), rest.failures, rest.ticks, rest.losses)
                if key not in seen:
                    seen[key] = None
                    if rest.depth:
                        below.append((then, rest))
        level = below
    return len(seen)


def each_read(world: World, left: Left, advance: Advance) -> Iterator[tuple[World, Left]]:
    """Fine: one record is read, the newest of its writer or the one before; or half a lease passes; or one fails."""
    deeper = replace(left, depth=left.depth - 1)
    for writer, reader, index in deliveries(world):
        yield world.deliver(writer, reader, index, advance), deeper
    if left.ticks:
        yield world.tick(world.rules.suspect_s, advance), replace(deeper, ticks=left.ticks - 1)
    yield from failing(world, deeper, advance)


def each_round(world: World, left: Left, advance: Advance) -> Iterator[tuple[World, Left]]:
    """Coarse and so long: half a lease passes, and all records are read but those of what is cut off in this round."""
    deeper = replace(left, depth=left.depth - 1)
    names = [p.name for p in world.places]
    then = world.tick(world.rules.suspect_s, advance)
    yield _exchange(then, frozenset(), advance), deeper
    if left.losses:
        lost = replace(deeper, losses=left.losses - 1)
        for a in names:
            yield _exchange(then, frozenset((a, b) for b in names) | {(b, a) for b in names}, advance), lost
            if len(names) > 2:
                yield from ((_exchange(then, frozenset({(a, b)}), advance), lost) for b in names if a != b)
    yield from failing(world, replace(left, depth=left.depth), advance)


def failing(world: World, left: Left, advance: Advance) -> Iterator[tuple[World, Left]]:
    """One agent crashes, one worker dies, or one agent comes back."""
    failed = replace(left, failures=left.failures - 1)
    for place in world.places:
        if left.failures and place.state and not place.state.ended:
            yield world.crash(place.name), failed
            if place.alive:
                yield world.kill_worker(place.name, advance), failed
        if place.state is None and place.disk:
            yield world.restart(place.name, advance), left


def _exchange(world: World, cut: frozenset[tuple[str, str]], advance: Advance) -> World:
    """All read what they have until nothing is new; what is cut off stays, and may be read in a later round."""
    for _ in range(8):
        links = [link for link, _ in world.mail if link not in cut]
        if not links:
            break
        for writer, reader in links:
            records = dict(world.mail).get((writer, reader))
            if records:
                world = world.deliver(writer, reader, len(records) - 1, advance)
    return world
