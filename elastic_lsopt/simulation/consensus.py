"""The consensus mode: replicas that step apart and meet, with members that are lost, come late and come back.

A round: each member takes its steps and says that it is there. The meeting begins when all have come who are waited
for, or half of `timeout_s` after the first (elastic_lsopt/backends/peers/meeting.py); then the exchange. What costs
time here is an event, not a replica: of 100,000 members the first and the last arrival are drawn, those that are lost,
late or new are followed one by one, and rounds in which nothing happens are drawn together.

    lost          its own steps since its last exchange; the others wait for it until they know, at most that half
    lost in the   the exchange fails: all keep what they have, and try again after another round
    exchange
    late          has no samples left and waits for the next meeting after it has come, where its steps count
    back          waits for a meeting, is given the model there, and steps from then on
    heals         a replica of many GPUs pauses instead, and goes on with the rest of them
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass, field

import numpy as np

from elastic_lsopt.simulation.outages import Outages
from elastic_lsopt.simulation.outcome import Outcome, Spent
from elastic_lsopt.simulation.rounds import Arrivals, Kind, Late, arrivals, kinds_of, too_late
from elastic_lsopt.simulation.scenario import Scenario

MODE = "consensus"
MOST_ROUNDS = 4096
"""Drawn together."""
Event = tuple[float, int, float, bool]
"""When, which replica, when it is back at work or, where it heals, for how long it pauses, and whether it loses one."""


def consensus(scenario: Scenario, outages: Outages, *, until_steps: float = math.inf) -> Outcome:
    """The job's outcome, until the first exchange at the end of the time or later, or the one that reaches
    `until_steps`."""
    simulated = _Consensus(scenario, outages)
    while simulated.now < scenario.horizon_s and simulated.steps < until_steps:
        simulated.quiet_rounds(until_steps)
        if simulated.steps < until_steps:
            simulated.round()
    return simulated.outcome()


@dataclass
class _Round:
    """A round under way; times are the job's."""

    begin: float
    first: list[float]
    """Of each kind's members that do not pause; inf for none, as `last` is -inf."""
    last: list[float]
    paused: dict[int, float]
    """When members come that pause in this round."""
    missing: dict[int, float] = field(default_factory=dict)
    """When the others know of those who are lost and had not come."""
    known: float = 0.0
    """When they know of all who are lost and had come."""
    broken: bool = False
    decided: float = 0.0
    late: list[Late] = field(default_factory=list)
    """Of each kind, who come after the decision."""
    newcomers: list[int] = field(default_factory=list)
    """Who are given the model."""


class _Consensus:
    def __init__(self, scenario: Scenario, outages: Outages) -> None:
        self.s, self.rng = scenario, np.random.default_rng([scenario.seed, 2])
        self.kinds = kinds_of(scenario)
        self.outages, self.heals = outages, scenario.heals and not outages.whole
        self.events, self.at = _events(scenario, outages, heals=self.heals), 0
        self.now = self._noted = 0.0
        self.unsettled = 0
        """Rounds since the last exchange that went well."""
        self.away: dict[int, float] = {}
        """Those that are lost, by when they are there again."""
        self.coming: list[tuple[float, int]] = []
        """The same in order of time; an entry that `away` does not confirm is out of date."""
        self.pauses: dict[int, float] = {}
        """For how long from a round's begin a replica that heals still stands."""
        self.drawn: Arrivals | None = None
        """Of the next round, where it is known already."""
        self.spent, self.steps, self.lost_steps = Spent(), 0.0, 0.0

    def outcome(self) -> Outcome:
        self._note(self.now)
        if self.heals:  # in the meantime a replica is so much smaller
            back_s = np.minimum(self.outages.up_s + self.s.restart_s, self.now)
            missing = float(np.maximum(back_s - self.outages.down_s, 0).sum()) / self.s.gpus
            lacking = self.spent.useful * missing / (self.s.replicas * self.now)
            self.spent.away += lacking
            self.steps *= 1 - lacking / self.spent.useful
            self.spent.useful -= lacking
        failures = len(self.outages.until(self.now))
        return self.spent.outcome(
            MODE, self.s, self.now, steps=self.steps, lost_steps=self.lost_steps, failures=failures
        )

    # -- rounds in which nothing happens -----------------------------------------------------------------------

    def quiet_rounds(self, until_steps: float) -> None:
        """All rounds that end before something happens."""
        there = self._there
        if self.unsettled or self.pauses or not there or any(kind.late for kind in self.kinds):
            return
        exchange_s = self.s.exchange_s if there > 1 else 0.0
        least = max(kind.round.mean_s for kind in self.kinds if kind.members) + exchange_s
        counted = sum(kind.members * kind.steps for kind in self.kinds)
        useful = sum(kind.members * kind.steps * kind.mean_s for kind in self.kinds)
        next_s = min(self._next_s, self._back_s, self.s.horizon_s)
        while next_s > self.now and self.drawn is None:
            rounds = min(MOST_ROUNDS, int((next_s - self.now) / least) + 2)
            drawn = arrivals(self.kinds, self.rng, rounds)
            last, first = drawn.last.max(axis=0), drawn.first.min(axis=0)
            ends = self.now + np.cumsum(last + exchange_s)
            over = np.flatnonzero((ends > next_s) | (last - first > self.s.timeout_s / 2))
            n = int(over[0]) if len(over) else rounds
            if until_steps < math.inf:
                n = min(n, math.ceil((until_steps - self.steps) / counted))
            if n:
                self.spent.exchange += there * exchange_s * n
                self.spent.useful += useful * n
                self.steps += counted * n
                self.now = float(ends[n - 1])
            if self.steps >= until_steps:
                return
            if len(over):
                self.drawn = Arrivals(drawn.first[:, n], drawn.last[:, n])

    # -- a round in which something may happen -----------------------------------------------------------------

    def round(self) -> None:
        """The next round, event by event."""
        if not self._there:
            self._begin_again()
            return
        going = self._begin_round()
        come, decided = self._decided(going)
        while self._next_s < decided and self._there:
            self._on_the_way(going)
            come, decided = self._decided(going)
        if not self._there:
            return
        going.decided, going.late = decided, self._late(going, decided)
        going.newcomers = self._arrived(decided)
        here = sum(group.number for kind in self.kinds for group in kind.late if group.ready <= decided)
        attend = self._there - sum(group.number for group in going.late) + here + len(going.newcomers)
        end = decided + (self.s.exchange_s if attend > 1 else 0.0)
        if going.broken:
            end = max(decided, min(going.known, come + self.s.timeout_s))
        while self._next_s < end and self._there:
            end = self._in_exchange(going, end, come)
        self.spent.exchange += attend * (end - decided)
        self._settle(going, end)
        self.now = end

    def _begin_round(self) -> _Round:
        drawn = self.drawn
        if drawn is None:
            both = arrivals(self.kinds, self.rng, 1)
            drawn = Arrivals(both.first[:, 0], both.last[:, 0])
        self.drawn = None
        paused = {r: self.now + self._kind(r).round.mean_s + pause for r, pause in self.pauses.items()}
        self.pauses = {}
        return _Round(self.now, (self.now + drawn.first).tolist(), (self.now + drawn.last).tolist(), paused)

    def _decided(self, going: _Round) -> tuple[float, float]:
        """When the first member comes, and when it is decided who is in."""
        free = [kind.members - sum(self._kind(r) is kind for r in going.paused) for kind in self.kinds]
        first = min([t for t, n in zip(going.first, free, strict=True) if n > 0] + [*going.paused.values(), math.inf])
        last = max([t for t, n in zip(going.last, free, strict=True) if n > 0] + [*going.paused.values(), -math.inf])
        missing = max((min(known, self.away[r]) for r, known in going.missing.items()), default=0.0)
        return first, min(max(last, missing), first + self.s.timeout_s / 2)

    def _on_the_way(self, going: _Round) -> None:
        """What happens before it is decided who is in."""
        at_s, replica, more, loses = self._pop()
        kind = self._kind(replica)
        arrives = going.paused.get(replica, going.begin + kind.round.mean_s)
        if replica in self.away:
            self._lengthen(replica, more)
        elif self.heals:
            if at_s < arrives:
                again = (at_s - going.begin) % kind.mean_s if loses else 0.0
                going.paused[replica] = arrives + more + again
                self.lost_steps += again / kind.mean_s
                self.spent.lost += again
            else:
                self.pauses[replica], going.broken = max(more, self.pauses.get(replica, 0.0)), True
        else:
            going.paused.pop(replica, None)
            if self._lose(replica, at_s, more, going.begin):
                known = at_s + self.s.notice_s
                if at_s >= arrives:  # it has said that it was there
                    going.known, going.broken = max(going.known, known), True
                else:
                    going.missing[replica] = known

    def _in_exchange(self, going: _Round, end: float, come: float) -> float:
        """What happens in an exchange; when the exchange ends."""
        at_s, replica, more, _ = self._pop()
        if self.heals:
            self.pauses[replica], going.broken = max(more, self.pauses.get(replica, 0.0)), True
            return at_s  # its other ranks say so at once
        if replica in self.away:
            self._lengthen(replica, more)
            takes_part = replica in going.newcomers
        else:
            takes_part = self._lose(replica, at_s, more, going.begin)
        if not takes_part:
            return end
        going.known, going.broken = max(going.known, at_s + self.s.notice_s), True
        return max(at_s, min(going.known, come + self.s.timeout_s))

    def _late(self, going: _Round, decided: float) -> list[Late]:
        """How many of each kind come after the decision. Those that pause are late by name, the others by number."""
        late = []
        for kind, first, last in zip(self.kinds, going.first, going.last, strict=True):
            paused = [at_s for r, at_s in going.paused.items() if self._kind(r) is kind]
            free = kind.members - len(paused)
            begin = going.begin
            number = too_late(kind, free, first - begin, last - begin, decided - begin, self.rng)
            number += sum(at_s > decided for at_s in paused)
            ready = max([last if free else -math.inf, *paused])
            late.append(Late(min(number, kind.members), self.unsettled * kind.steps, begin, ready))
        return late

    def _settle(self, going: _Round, end: float) -> None:
        self.unsettled += 1
        self._note(end)
        for kind, late in zip(self.kinds, going.late, strict=True):
            kind.members -= late.number
            here = [] if going.broken else [group for group in kind.late if group.ready <= going.decided]
            kind.late = [group for group in [*kind.late, late] if group.number and group not in here]
            if not going.broken:
                counted = kind.members * self.unsettled * kind.steps
                counted += sum(group.number * (group.pending + kind.steps) for group in here)
                self.steps += counted
                self.spent.useful += counted * kind.mean_s
                kind.members += sum(group.number for group in here)
        if going.broken:
            return
        for replica in going.newcomers:
            del self.away[replica]
            self._kind(replica).members += 1
        self.unsettled = 0

    def _begin_again(self) -> None:
        """Nobody is there: those late go on, else the first to come back begins from the last checkpoint."""
        self.drawn, self.unsettled = None, 0
        for kind in self.kinds:
            steps = sum(group.number * (group.pending + kind.steps) for group in kind.late)
            self.lost_steps += steps
            self.spent.lost += steps * kind.mean_s
            kind.members, kind.late = kind.number_late, []
        if self._there:
            return
        while self._next_s < self._back_s:
            _, replica, more, _ = self._pop()
            if replica in self.away:
                self._lengthen(replica, more)
        self.now = max(self.now, self._back_s)
        self._note(self.now)
        for replica in self._arrived(self.now):
            del self.away[replica]
            self._kind(replica).members += 1

    # -- who is where ------------------------------------------------------------------------------------------

    @property
    def _there(self) -> int:
        return sum(kind.members for kind in self.kinds)

    def _kind(self, replica: int) -> Kind:
        return self.kinds[-1 if replica >= self.s.replicas - self.s.slow else 0]

    def _lose(self, replica: int, at_s: float, back_s: float, begin: float) -> bool:
        """A replica is gone. Whether the others wait for it: for one that is late nobody does."""
        kind = self._kind(replica)
        self._note(at_s)
        late = kind.number_late
        waited_for = not late or self.rng.random() * (kind.members + late) >= late
        pending = self.unsettled * kind.steps
        if waited_for:
            kind.members -= 1
        else:
            shares = np.array([group.number for group in kind.late]) / late
            group = kind.late[int(self.rng.choice(len(shares), p=shares))]
            begin, pending = group.begin, group.pending
            group.number -= 1
            kind.late = [group for group in kind.late if group.number]
        steps = pending + min(kind.steps, (at_s - begin) // kind.mean_s)
        self.lost_steps += steps
        self.spent.lost += steps * kind.mean_s
        self._lengthen(replica, back_s)
        return waited_for

    def _lengthen(self, replica: int, back_s: float) -> None:
        self.away[replica] = max(back_s, self.away.get(replica, 0.0))
        heapq.heappush(self.coming, (self.away[replica], replica))

    def _arrived(self, by_s: float) -> list[int]:
        """Those that are back by then."""
        found = {}
        while self._back_s <= by_s:
            at_s, replica = heapq.heappop(self.coming)
            found[replica] = at_s
        for replica, at_s in found.items():
            heapq.heappush(self.coming, (at_s, replica))
        return list(found)

    def _note(self, at_s: float) -> None:
        """Count the time of those that are away, up to now."""
        self.spent.away += len(self.away) * (at_s - self._noted)
        self._noted = at_s

    # -- what happens next -------------------------------------------------------------------------------------

    @property
    def _next_s(self) -> float:
        return self.events[self.at][0] if self.at < len(self.events) else math.inf

    @property
    def _back_s(self) -> float:
        while self.coming and self.away.get(self.coming[0][1]) != self.coming[0][0]:
            heapq.heappop(self.coming)
        return self.coming[0][0] if self.coming else math.inf

    def _pop(self) -> Event:
        self.at += 1
        return self.events[self.at - 1]


def _events(scenario: Scenario, outages: Outages, *, heals: bool) -> list[Event]:
    """In order of time: losses, each with when the replica is back; or pauses, of one that heals."""
    back_s = (outages.up_s + scenario.restart_s).tolist()
    downs, replicas = outages.down_s.tolist(), outages.replica.tolist()
    if not heals:
        return [(at_s, r, back, True) for at_s, r, back in zip(downs, replicas, back_s, strict=True)]
    losses = [(at_s, r, scenario.reform_s, True) for at_s, r in zip(downs, replicas, strict=True)]
    return sorted(losses + [(at_s, r, scenario.join_s, False) for at_s, r in zip(back_s, replicas, strict=True)])
