"""What a change of members costs at up to 10,000 workers: the real machine on a simulated network, event by event.

A put and a get of a store are one operation each; a round is one network delay on the longest chain of records. Counted
from the event to the last Enter, without the heartbeats that would have been sent anyway. `leader_beats_busy` is the
CPU time of the leader's machine for heartbeats alone, in one second: where it nears 1 the job needs a longer lease. All
agents are in one process here, so equal generations are kept once (`Shared`): each agent would make its own.
"""

from __future__ import annotations

import heapq
import itertools
import json
import time
from collections.abc import Callable
from dataclasses import fields

from elastic_lsopt.elastic.membership import machine as membership
from elastic_lsopt.elastic.membership.generation import Change, Generation, Member
from elastic_lsopt.elastic.membership.quorum import Ballot, Vote
from elastic_lsopt.elastic.membership.record import (
    Enter,
    Event,
    Heard,
    Publish,
    Record,
    Rules,
    Tick,
    WorkerExited,
    WorkerReady,
)
from elastic_lsopt.elastic.membership.state import Campaign, State

CHANGES = ("join", "worker_death", "node_silence", "host_death")
DELAY_S = 0.001
"""From a put until the reader has the record."""


class Shared(Generation):
    """A generation that makes the one after it once for all agents of the simulation."""

    def after(self, change: Change) -> Generation:
        made = self.__dict__.setdefault("made", {})
        if change not in made:
            plain = super().after(change)
            made[change] = Shared(**{f.name: getattr(plain, f.name) for f in fields(plain)})
        return made[change]


class Simulation:
    """`agents` agents in a running generation; records take DELAY_S."""

    def __init__(self, agents: int, workers: int) -> None:
        self.rules = Rules(1, 2 * agents + 2, "j", {}, join_debounce_s=0.0)
        self.workers = workers
        names = [f"n{i}" for i in range(agents)]
        members = tuple(Member(n, n, tuple(f"{n}/{w}" for w in range(workers))) for n in names)
        first = Shared(1, 0, "n0", members, "", (), running=True)
        self.states: dict[str, State] = {
            m.name: State(
                self.rules, m.name, m.name, generation=first, vote=Vote(Ballot(0, "n0")), workers=m.workers,
                offered=m.workers, lease_until_s=2.0, suspect_from_s=1.0, last=Change("", "n0", 0, running=True),
                campaign=Campaign(Ballot(0, "n0"), 0.0, quorum_s=0.0) if m.name == "n0" else None,
            )
            for m in members
        }  # fmt: skip
        self.queue: list[tuple[float, int, str, Event, int]] = []
        self.order = itertools.count()
        self.now = 0.0
        self.dead: set[str] = set()
        self.count()
        for i, name in enumerate(names):
            self.at(self.rules.heartbeat_s * i / agents, name, Tick(), 0)

    def count(self) -> None:
        """Start counting anew."""
        self.messages = self.bytes = self.rounds = 0
        self.entered: dict[str, float] = {}
        self.leader_s = 0.0

    def at(self, when: float, name: str, event: Event, depth: int) -> None:
        heapq.heappush(self.queue, (when, next(self.order), name, event, depth))

    def until(self, end: float, done: Callable[[], bool] = lambda: False) -> None:
        while self.queue and self.queue[0][0] <= end and not done():
            self.now, _, name, event, depth = heapq.heappop(self.queue)
            if name in self.dead:
                continue
            if isinstance(event, Tick):
                self.at(self.now + self.rules.heartbeat_s, name, event, 0)
            begin = time.process_time()
            self.states[name], effects = membership.advance(self.states[name], event, self.now)
            if name == "n0":
                self.leader_s += time.process_time() - begin
            for effect in effects:
                if isinstance(effect, Publish):
                    self.send(effect, depth + 1)
                elif isinstance(effect, Enter):
                    self.entered[name] = self.now
                    self.rounds = max(self.rounds, depth)

    def send(self, effect: Publish, depth: int) -> None:
        size = len(json.dumps(effect.record.to_json())) if self.counts(effect.record) else 0
        for reader, address in effect.to:
            self.messages += size > 0
            self.bytes += size
            if (reader or address) in self.states:
                self.at(self.now + DELAY_S, reader or address, Heard((effect.record,)), depth)

    @staticmethod
    def counts(record: Record) -> bool:
        """Whether a record belongs to a change, not to the heartbeats: it asks, votes or tells news."""
        return bool(record.ask or record.change or record.generation or (record.vote and record.vote.accepted))

    def change(self, name: str) -> dict[str, float]:
        """Cause a change and follow it until every living member has entered the next generation."""
        self.until(1.0)
        beats_busy = self.leader_s / self.now
        self.count()
        before = self.now
        expected = len(self.states)
        if name == "join":
            self.states["new"] = membership.newcomer("new", "new", self.rules, "n0")
            for w in range(self.workers):
                self.at(self.now, "new", WorkerReady(f"new/{w}"), 0)
            self.at(self.now + 0.01, "new", Tick(), 0)
            expected += 1
        elif name == "worker_death":
            victim = list(self.states)[-1]
            self.at(self.now, victim, WorkerExited(self.states[victim].workers[0]), 0)
        else:
            victim = "n0" if name == "host_death" else list(self.states)[-1]
            self.dead.add(victim)
            expected -= 1
        begin = time.perf_counter()
        self.until(before + 20.0, lambda: len(self.entered) == expected)
        workers = expected * self.workers
        assert len(self.entered) == expected, f"{name}: {len(self.entered)} of {expected} entered"
        return {
            "seconds": round(self.now - before, 3),
            "rounds": self.rounds,
            "messages_per_agent": round(self.messages / expected, 2),
            "store_operations_per_worker": round(2 * self.messages / workers, 2),
            "bytes_per_agent": round(self.bytes / expected),
            "leader_beats_busy": round(beats_busy, 3),
            "wall_s": round(time.perf_counter() - begin, 2),
        }


def run(sizes: tuple[int, ...] = (100, 1000, 10_000), per_agent: tuple[int, ...] = (8, 1)) -> dict[str, float]:
    """Figures by change, workers an agent, and workers."""
    figures: dict[str, float] = {}
    for workers in per_agent:
        for total in sizes:
            for change in CHANGES:
                cost = Simulation(total // workers, workers).change(change)
                print(f"{change:13} {total:6} workers, {workers} an agent: {cost}", flush=True)
                figures |= {f"{change}_{workers}_an_agent_{total}_{key}": value for key, value in cost.items()}
    small, large = min(sizes), max(sizes)
    for change in CHANGES:
        few, many = (
            figures[f"{change}_{per_agent[0]}_an_agent_{total}_store_operations_per_worker"] for total in (small, large)
        )
        figures[f"{change}_store_operations_per_worker_of_{large}_over_{small}"] = many / few
    return figures
