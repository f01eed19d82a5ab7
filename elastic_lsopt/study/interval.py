"""The mean of a few runs, and the interval in which the mean of all would lie: Student's t.

    mean ± t_{(1 + confidence) / 2, n - 1} s / sqrt(n)          s: standard deviation with n - 1

It assumes that the runs' numbers scatter like a normal distribution; with five seeds that cannot be checked.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev


@dataclass(frozen=True)
class Interval:
    """`half` is half of its width; NaN of fewer than two values."""

    mean: float
    half: float
    n: int


def interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Of these values; its mean is NaN where there is none."""
    n = len(values)
    if n < 2:
        return Interval(values[0] if values else math.nan, math.nan, n)
    return Interval(fmean(values), quantile((1 + confidence) / 2, n - 1) * stdev(values) / math.sqrt(n), n)


def quantile(p: float, degrees: int) -> float:
    """The value below which Student's t lies with probability p in (0.5, 1), by bisection.

    >>> round(quantile(0.975, 4), 6)
    2.776445
    """
    low, high = 0.0, 1.0
    while probability(high, degrees) < p:
        low, high = high, 2 * high
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if probability(middle, degrees) < p else (low, middle)
    return (low + high) / 2


def probability(t: float, degrees: int) -> float:
    """That Student's t with whole degrees of freedom is at most t >= 0: Abramowitz, Stegun, 26.7.3 and 26.7.4."""
    angle = math.atan(t / math.sqrt(degrees))
    cosine, term, total = math.cos(angle), 1.0, 1.0
    odd = degrees % 2
    for k in range(1 + odd, degrees - 1, 2):
        term *= cosine * cosine * k / (k + 1)
        total += term
    if not odd:
        return 0.5 + math.sin(angle) * total / 2
    rest = math.sin(angle) * cosine * total if degrees > 1 else 0.0
    return 0.5 + (angle + rest) / math.pi
