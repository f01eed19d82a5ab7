"""A round of many replicas without one number per replica: who arrives first, who last, and how many too late."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from elastic_lsopt.simulation.scenario import Scenario
from elastic_lsopt.simulation.step_times import Array, Sums, sums


@dataclass
class Late:
    """Members of one kind who came after a decision, and are in at a later meeting."""

    number: int
    pending: int
    """Steps of each, from rounds before, that no exchange has counted."""
    begin: float
    ready: float
    """The last of them, of the job's time."""


@dataclass
class Kind:
    """Replicas of one speed: what a round is for them, and how many are where."""

    steps: int
    mean_s: float
    """Of a step."""
    round: Sums
    """When it has taken its steps, from the round's begin."""
    members: int
    late: list[Late] = field(default_factory=list)

    @property
    def number_late(self) -> int:
        return sum(group.number for group in self.late)


@dataclass(frozen=True)
class Arrivals:
    """First and last of each kind, seconds from the round's begin; without members inf and -inf."""

    first: Array
    last: Array


def kinds_of(scenario: Scenario) -> list[Kind]:
    """Ordinary replicas, then slow ones; by speed: steps by pace over the mean pace (data/rounds.py)."""
    s = scenario
    slow_pace = 1.0 / s.slow_factor
    mean_pace = 1.0 - s.slow / s.replicas * (1.0 - slow_pace)
    kinds = []
    for factor, number in ((1.0, s.replicas - s.slow), (s.slow_factor, s.slow)):
        steps = max(1, round(s.tau / factor / mean_pace)) if s.steps == "by_speed" else s.tau
        table = sums(s.step_times, s.step_s, s.spread, steps).scaled(factor)
        kinds.append(Kind(steps, s.step_s * factor, table, number))
    return kinds if s.slow else kinds[:1]


def arrivals(kinds: Sequence[Kind], rng: np.random.Generator, rounds: int) -> Arrivals:
    """Of so many rounds: a row for each kind."""
    first, last = np.full((len(kinds), rounds), np.inf), np.full((len(kinds), rounds), -np.inf)
    for row, kind in enumerate(kinds):
        if kind.members:
            first[row], last[row] = kind.round.extremes(kind.members, rng, rounds)
    return Arrivals(first, last)


def too_late(kind: Kind, members: int, first_s: float, last_s: float, end_s: float, rng: np.random.Generator) -> int:
    """How many of so many members come after `end_s`, given when the first and the last of them come."""
    if last_s <= end_s or not members:
        return 0
    if first_s > end_s or members == 1:
        return members
    if members == 2:
        return 1
    below_first, below_last = kind.round.below(first_s), kind.round.below(last_s)
    share = (below_last - kind.round.below(end_s)) / max(below_last - below_first, 1e-300)
    return 1 + int(rng.binomial(members - 2, min(1.0, max(0.0, share))))
