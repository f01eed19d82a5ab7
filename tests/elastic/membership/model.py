"""A world of agents that run the real machine: what the network, the clocks and failures can do, and what must hold.

A world is a value: `tick`, `deliver`, `crash` … give the next one, or raise Violation. Records lie between writer and
reader as registers do: an older one may still be read (delay), or never (loss); one that was heard is dropped, since
reading it again is shown to change nothing at each delivery (doubling).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cache
from math import isinf
from typing import Any

from elastic_lsopt.elastic.membership import machine as membership
from elastic_lsopt.elastic.membership.generation import Generation
from elastic_lsopt.elastic.membership.quorum import WitnessVote
from elastic_lsopt.elastic.membership.record import (
    AskWitness,
    Effect,
    Enter,
    Event,
    Heard,
    Heartbeat,
    KillWorkers,
    Leave,
    Persist,
    Publish,
    Record,
    Remembered,
    Rules,
    Tick,
    WitnessSaid,
    WorkerExited,
    WorkerReady,
)
from elastic_lsopt.elastic.membership.state import State

Advance = Callable[..., tuple[State, tuple[Effect, ...]]]


class Violation(AssertionError):
    """The machine broke an invariant."""


@dataclass(frozen=True)
class Place:
    """One node: its agent's state (None: crashed), its disk, its living workers and its clock."""

    name: str
    state: State | None
    disk: Remembered | None = None
    alive: frozenset[str] = frozenset()
    spawned: int = 0
    clock_s: float = 0.0
    rate: float = 1.0
    entered: int = 0
    full: bool = False
    """Nothing can be written to its disk."""

    def take(self, event: Event, advance: Advance) -> tuple[State, tuple[Effect, ...]]:
        """What the agent makes of an event: without a vote where its vote cannot be written."""
        assert self.state is not None
        state, effects = advance(self.state, event, self.clock_s)
        if self.full and any(isinstance(e, Persist) for e in effects):
            state, effects = advance(self.state, event, self.clock_s, may_vote=False)
        return state, effects


@dataclass(frozen=True)
class World:
    places: tuple[Place, ...]
    rules: Rules
    mail: tuple[tuple[tuple[str, str], tuple[Record, ...]], ...] = ()
    """(writer, reader) to the newest `depth` records that were not heard yet."""
    depth: int = 2
    decided: tuple[Generation, ...] = ()
    witness: WitnessVote | None = None
    witness_cut: frozenset[str] = frozenset()

    # What happens. ---------------------------------------------------------------------------------------------------

    def place(self, name: str) -> Place:
        return next(p for p in self.places if p.name == name)

    def tick(
        self, seconds: float, advance: Advance = membership.advance, asleep: frozenset[str] = frozenset()
    ) -> World:
        """True time passes, and every agent that is awake sees its clock."""
        places = tuple(replace(p, clock_s=p.clock_s + seconds * p.rate) for p in self.places)
        world = replace(self, places=places)
        for p in places:
            if p.state and p.name not in asleep:
                world = world.give(p.name, Tick(), advance)
        return world

    def deliver(self, writer: str, reader: str, index: int, advance: Advance = membership.advance) -> World:
        """The reader reads one of the records; older ones are overwritten."""
        records = dict(self.mail)[writer, reader]
        return self._with_mail((writer, reader), records[index + 1 :])._read(reader, (records[index],), advance)

    def deliver_newest(self, writers: tuple[str, ...], reader: str, advance: Advance = membership.advance) -> World:
        """The reader reads the newest record of each writer, all at once."""
        world, newest, mail = self, [], dict(self.mail)
        for writer in writers:
            newest.append(mail[writer, reader][-1])
            world = world._with_mail((writer, reader), ())
        return world._read(reader, tuple(newest), advance)

    def _read(self, reader: str, records: tuple[Record, ...], advance: Advance) -> World:
        if self.place(reader).state is None:
            return self
        world = self.give(reader, Heard(records), advance)
        after = world.place(reader)
        if after.state:
            again, effects = after.take(Heard(records), advance)
            if again != after.state or effects:
                raise Violation(f"{reader} does something when it reads {records} twice: {effects}")
        return world

    def crash(self, name: str) -> World:
        """The agent dies, and its workers with it; its store is empty when it comes again."""
        place = self.place(name)
        kept = tuple((link, records) for link, records in self.mail if name not in link)
        return replace(self._with(replace(place, state=None, alive=frozenset())), mail=kept)

    def restart(self, name: str, advance: Advance = membership.advance) -> World:
        place = self.place(name)
        assert place.disk is not None
        state = membership.restarted(place.disk, name, self.rules, place.clock_s)
        entered = min(place.entered, place.disk.generation.number)  # a full disk does not remember the newest
        return self._with(replace(place, state=state, entered=entered)).spawn(name, advance)

    def fill(self, *names: str) -> World:
        """The disks of these nodes are full from now on, and no others."""
        return replace(self, places=tuple(replace(p, full=p.name in names) for p in self.places))

    def kill_worker(self, name: str, advance: Advance = membership.advance) -> World:
        place = self.place(name)
        worker = min(place.alive)
        return self._with(replace(place, alive=place.alive - {worker})).give(name, WorkerExited(worker), advance)

    def spawn(self, name: str, advance: Advance = membership.advance) -> World:
        place = self.place(name)
        worker = f"{name}{place.spawned}"
        place = replace(place, alive=place.alive | {worker}, spawned=place.spawned + 1)
        return self._with(place).give(name, WorkerReady(worker), advance)

    def give(self, name: str, event: Event, advance: Advance = membership.advance) -> World:
        """The agent takes one event, and its effects happen."""
        place = self.place(name)
        assert place.state is not None
        state, effects = place.take(event, advance)
        world = self._with(replace(place, state=state))
        said: list[Event] = []
        for effect in effects:
            place = world.place(name)
            match effect:
                case Persist(remembered):
                    world = world._with(replace(place, disk=remembered))
                case Publish(to, record):
                    for known, address in to:
                        reader = known or address  # an agent's address is its name here
                        if any(p.name == reader for p in world.places):
                            queue = (*dict(world.mail).get((name, reader), ()), record)[-world.depth :]
                            world = world._with_mail((name, reader), queue)
                case Enter(generation):
                    if generation.number <= place.entered:
                        raise Violation(f"{name} enters {generation.number} after {place.entered}")
                    world = world._decide(generation)._with(replace(place, entered=generation.number))
                    members = {worker for _, worker in generation.ranks}
                    said += [WorkerExited(w) for w in state.draining if w not in members]
                case KillWorkers():
                    world = world._with(replace(place, alive=frozenset()))
                case Leave():
                    world = world._with(replace(place, alive=frozenset()))
                case AskWitness(number, ask, sent_s) if name not in self.witness_cut:
                    stored = WitnessVote.answer(world.witness, number, ask)
                    world = replace(world, witness=stored)
                    said.append(WitnessSaid(stored.number, stored.vote, sent_s))
        if state.generation:
            world = world._decide(state.generation)
        for answer in said:
            if isinstance(answer, WorkerExited):
                place = world.place(name)
                world = world._with(replace(place, alive=place.alive - {answer.worker}))
            world = world.give(name, answer, advance)
        return world

    # What must hold. -------------------------------------------------------------------------------------------------

    def _decide(self, generation: Generation) -> World:
        """One value a number; and whoever is lost in it is dead by now."""
        known = {g.number: g for g in self.decided}
        if (first := known.get(generation.number)) is not None:
            if first != generation:
                raise Violation(f"two generations {generation.number}: {first} and {generation}")
            return self
        alive = set().union(*(p.alive for p in self.places))
        if still := alive.intersection(generation.gone):
            raise Violation(f"{still} are alive though generation {generation.number} counts them as lost")
        self._check_replicas(generation)
        return replace(self, decided=tuple(sorted((*self.decided, generation), key=lambda g: g.number)))

    def _check_replicas(self, generation: Generation) -> None:
        """Every worker is in one replica, and a group of workers has a name that no other has ever had."""
        if len(generation.replicas) != (self.rules.replicas if self.rules.replicas > 1 else 0):
            raise Violation(f"{len(generation.replicas)} replicas in {generation}")
        placed = sorted(w for r in generation.replicas for w in r.workers)
        if generation.replicas and placed != sorted(w for _, w in generation.ranks):
            raise Violation(f"{placed} are placed of {generation}")
        for other in self.decided:
            for ours, theirs in zip(generation.replicas, other.replicas, strict=True):
                if ours.since == theirs.since and ours != theirs:
                    raise Violation(f"two groups of one name: {ours} and {theirs}")

    def settled(self) -> bool:
        """Whether exactly the living agents with their living workers are the agreed world, and all know it."""
        newest = self.decided[-1] if self.decided else None
        living = {p.name: p.alive for p in self.places if p.state and not p.state.ended}
        return (
            newest is not None
            and {m.name: frozenset(m.workers) for m in newest.members} == living
            and all(p.state.number == newest.number for p in self.places if p.state and not p.state.ended)
        )

    # Bookkeeping. ----------------------------------------------------------------------------------------------------

    def _with(self, place: Place) -> World:
        return replace(self, places=tuple(place if p.name == place.name else p for p in self.places))

    def _with_mail(self, link: tuple[str, str], records: tuple[Record, ...]) -> World:
        kept = [entry for entry in self.mail if entry[0] != link]
        return replace(self, mail=tuple(sorted([*kept, (link, records)] if records else kept, key=lambda e: e[0])))

    def run(self, seconds: float, advance: Advance = membership.advance, respawn: bool = True) -> World:
        """A healthy network: time passes heartbeat by heartbeat, and each record is read at once."""
        world = self
        step_s = self.rules.heartbeat_s / 2
        for _ in range(round(seconds / step_s)):
            world = world.tick(step_s, advance).flush(advance)
            for p in world.places:
                if respawn and p.state and not p.alive and not p.state.ended:
                    world = world.spawn(p.name, advance)
        return world

    def flush(self, advance: Advance = membership.advance) -> World:
        world, reads = self, 0
        while world.mail:
            (writer, reader), records = world.mail[0]
            world = world.deliver(writer, reader, len(records) - 1, advance)
            reads += 1
            assert reads < 50 * len(self.places) ** 2, "answers to answers: the records never end"
        return world


@cache
def _names(cls: type) -> tuple[str, ...]:
    return tuple(f.name for f in fields(cls) if f.name not in ("rules", "heartbeats", "saved", "reported_s", "heard"))


def form(value: Any, now: float, floor: float) -> Hashable:
    """What matters of a state or record: times relative to `now` and cut off at `floor`, heartbeats uncounted, no
    history.

    A record under way is always newer than what its reader has heard of its writer, so the count does not matter.
    """
    if isinstance(value, Heartbeat):
        return value.incarnation, max(floor, value.sent_s - now)
    if isinstance(value, float):
        return value if isinf(value) else max(floor, value - now)
    if isinstance(value, Generation):
        return value.number, value.host, value.members, value.running, value.replicas, value.store_since
    if is_dataclass(value):
        return tuple(form(getattr(value, name), now, floor) for name in _names(type(value)))
    if isinstance(value, tuple):
        return tuple(form(v, now, floor) for v in value)
    return value


def begin(count: int, rules: Rules, *, spares: int = 0) -> World:
    """A running generation of `count` agents with one worker each, none of whose records are under way."""
    names = [chr(ord("a") + i) for i in range(count + spares)]
    world = World((Place("a", membership.found("a", "a", rules)),), rules).spawn("a")
    for name in names[1:count]:
        state = membership.newcomer(name, name, rules, "a")
        world = replace(world, places=(*world.places, Place(name, state))).spawn(name)
    world = world.run(3 * rules.lease_s)
    assert world.settled() and world.decided[-1].running, world.decided
    for name in names[count:]:
        state = membership.newcomer(name, name, rules, "a")
        world = replace(world, places=(*world.places, Place(name, state, clock_s=world.places[0].clock_s)))
    return world


def deliveries(world: World) -> Iterator[tuple[str, str, int]]:
    """Every read that is possible now: of the newest record or of an older one."""
    for (writer, reader), records in world.mail:
        for index in range(len(records)):
            yield writer, reader, index
