"""How long steps take: the sum of a replica's next steps, and the first and the last of many replicas.

    P(last of n <= x) = F(x)^n        so the last of 100,000 is one draw of F's quantile at u^(1/n), and so is the first

F is a table of the sum of `steps` independent step times with mean `step_s`: normal with a relative standard deviation
`spread`, or exponential (then the sum is Erlang's). Costs nothing per replica.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

POINTS = 4001
DEEPEST = 10.0
"""Standard deviations that a table reaches: 1e-23."""
Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Sums:
    """The distribution of the time that some steps take together: points, log F and log (1 - F) there."""

    mean_s: float
    points: Array
    log_below: Array
    log_above: Array

    def scaled(self, factor: float) -> Sums:
        """Of a replica that is slower by this factor."""
        return Sums(self.mean_s * factor, self.points * factor, self.log_below, self.log_above)

    def quantile(self, log_below: Array) -> Array:
        """The times below which F is so much; exact in both tails."""
        if len(self.points) == 1:
            return np.full_like(log_below, self.mean_s)
        above = _log_complement(log_below)
        upper = np.interp(-above, -self.log_above, self.points)
        return np.where(log_below > -math.log(2), upper, np.interp(log_below, self.log_below, self.points))

    def below(self, time_s: float) -> float:
        """F at this time."""
        if len(self.points) == 1:
            return float(time_s >= self.mean_s)
        return math.exp(np.interp(time_s, self.points, self.log_below, left=-math.inf, right=0.0))

    def extremes(self, replicas: int, rng: np.random.Generator, rounds: int) -> tuple[Array, Array]:
        """The first and the last of so many replicas, in each of so many rounds: drawn together."""
        if len(self.points) == 1:
            same = np.full(rounds, self.mean_s)
            return same, same
        log_last = -rng.exponential(size=rounds) / replicas
        log_first = log_last.copy()
        if replicas > 1:  # the others lie below the last one, evenly
            log_first += _log_complement(-rng.exponential(size=rounds) / (replicas - 1))
        return self.quantile(log_first), self.quantile(log_last)


@lru_cache(maxsize=64)
def sums(kind: str, step_s: float, spread: float, steps: int) -> Sums:
    """Of `steps` steps."""
    mean_s = step_s * steps
    if kind == "exponential":
        return _erlang(step_s, steps)
    if spread == 0:
        return Sums(mean_s, np.array([mean_s]), np.zeros(1), np.full(1, -math.inf))
    scores = np.linspace(-DEEPEST, DEEPEST, POINTS)
    above = np.log([0.5 * math.erfc(z / math.sqrt(2)) for z in scores])
    return Sums(mean_s, mean_s + scores * spread * step_s * math.sqrt(steps), above[::-1].copy(), above)


def _erlang(step_s: float, steps: int) -> Sums:
    deviation = math.sqrt(steps)
    scores = np.linspace(max(1e-9, steps - DEEPEST * deviation), steps + DEEPEST * deviation + 60, POINTS)
    term = -scores
    above = term.copy()
    for j in range(1, steps):
        term = term + np.log(scores / j)
        above = np.logaddexp(above, term)
    above = np.minimum(above, -1e-300)
    return Sums(step_s * steps, scores * step_s, _log_complement(above), above)


def mean_of_last(groups: Sequence[tuple[Sums, int]]) -> float:
    """The expected time of the last of them all: groups of so many replicas each."""
    there = [(table, n) for table, n in groups if n]
    sure = max((table.mean_s for table, _ in there if len(table.points) == 1), default=0.0)
    spread = [(table, n) for table, n in there if len(table.points) > 1]
    if not spread:
        return sure
    points = np.unique(np.concatenate([[sure], *(table.points for table, _ in spread)]))
    points = points[points >= sure]
    log_all = sum(n * np.interp(points, t.points, t.log_below, left=-np.inf, right=0.0) for t, n in spread)
    return float(points[0] + np.trapezoid(-np.expm1(log_all), points))


def _log_complement(log_share: Array) -> Array:
    """log (1 - p) of log p."""
    with np.errstate(divide="ignore"):
        return np.log(-np.expm1(log_share))
