"""How well a measure orders networks by their generalisation gap.

    tau_b = sum_ij s_ij t_ij / sqrt(sum_ij s_ij^2  sum_ij t_ij^2)     s_ij = sign(x_i - x_j), t_ij = sign(y_i - y_j)

Kendall 1945, "The treatment of ties in ranking problems". A bootstrap draw takes network i c_i times, and copies of
one network are ties in both, so its tau is a ratio of quadratic forms in c: all draws are three matrix products.

    Psi = mean over hyper-parameters h of the mean over groups of tau_b within the group

where a group's networks differ in h alone: the granulated coefficient of Jiang et al. 2019, "Fantastic generalization
measures and where to find them". It asks for order within each axis, where one that merely tells wide from narrow
networks gains nothing. Unlike there, ties are counted as tau_b does, and groups without a difference in the gap, which
order nothing, are left out.

Memory: two matrices of (networks)^2 numbers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, nan

import numpy as np
from numpy.typing import ArrayLike, NDArray

Row = Mapping[str, float | int | None]


@dataclass(frozen=True)
class Ranking:
    """`tau` with its bootstrap `interval` over `models` networks; nan where nothing is ordered (all are tied)."""

    tau: float
    interval: tuple[float, float]
    models: int
    granulated: dict[str, float]
    """The mean tau within groups that differ in that hyper-parameter alone; nan where there is no such group."""

    @property
    def psi(self) -> float:
        """The mean over the hyper-parameters that vary."""
        return _mean(self.granulated.values())


def rank(
    rows: Sequence[Row], measure: str, gap: str, *, axes: Sequence[str], draws: int, confidence: float, seed: int
) -> Ranking:
    """Rank the rows that have both numbers; each axis of `axes` with more than one value is granulated."""
    rows = [row for row in rows if _is_number(row.get(measure)) and _is_number(row.get(gap))]
    x, y = ([float(row[key] or 0) for row in rows] for key in (measure, gap))
    varied = [axis for axis in axes if len({row[axis] for row in rows}) > 1]
    granulated = {axis: _granulated(rows, x, y, axis, axes) for axis in varied if axis != "seed"}
    return Ranking(tau_b(x, y), bootstrap(x, y, draws, confidence, seed), len(rows), granulated)


def tau_b(x: ArrayLike, y: ArrayLike) -> float:
    """Kendall's tau-b, in [-1, 1]; nan where x or y has no two different values."""
    both = _signs(x), _signs(y)
    return float(_taus(*both, np.ones((1, len(both[0]))))[0])


def bootstrap(x: ArrayLike, y: ArrayLike, draws: int, confidence: float, seed: int) -> tuple[float, float]:
    """The percentile interval of tau-b over `draws` samples of the pairs, with replacement; nan without any order."""
    s, t = _signs(x), _signs(y)
    n = len(s)
    if not n:
        return nan, nan
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=draws)
    taus = _taus(s, t, counts.astype(float))
    taus = taus[np.isfinite(taus)]
    if not len(taus):
        return nan, nan
    low, high = np.quantile(taus, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _signs(x: ArrayLike) -> NDArray[np.float64]:
    x = np.asarray(x, np.float64)
    return np.sign(x[:, None] - x[None, :])


def _taus(s: NDArray[np.float64], t: NDArray[np.float64], counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """tau-b of each row of counts."""

    def form(m: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.einsum("di,di->d", counts @ m, counts)

    scale = np.sqrt(form(s * s) * form(t * t))
    with np.errstate(invalid="ignore"):
        return np.where(scale > 0, form(s * t) / np.where(scale > 0, scale, 1), nan)


def _granulated(rows: Sequence[Row], x: Sequence[float], y: Sequence[float], axis: str, axes: Sequence[str]) -> float:
    groups: dict[tuple[float | int | None, ...], list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        groups[tuple(row[other] for other in axes if other != axis)].append(i)
    taus = []
    for group in groups.values():
        gaps = [y[i] for i in group]
        if len(set(gaps)) > 1:
            tau = tau_b([x[i] for i in group], gaps)
            taus.append(tau if isfinite(tau) else 0.0)  # a measure that is the same for all orders none of them
    return _mean(taus)


def _mean(values: Iterable[float]) -> float:
    values = [v for v in values if isfinite(v)]
    return sum(values) / len(values) if values else nan


def _is_number(value: float | int | None) -> bool:
    return value is not None and isfinite(value)
