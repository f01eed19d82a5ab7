"""Mean Valley: how wide the valley between several workers is, from their mean to where the loss has grown kappa-fold.

    x_A = mean_m x_m        d_m = (x_m - x_A) / |x_m - x_A|
    t_m = the first t with L(x_A + t d_m) >= kappa L(x_A)            value mean_m t_m, its inverse the sharpness

Dimlioglu, Choromanska 2025, "Communication-Efficient Distributed Training for Collaborative Flat Optima Recovery in
Deep Learning" (DPPF), with kappa = 2. The walk's steps and its bisection are ours: the paper does not say.

Cost: about 40 forwards a worker; memory: three vectors beside the workers', and two shards while perturbed;
communication: a forward's; one all-reduce a worker.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite, sqrt
from statistics import fmean, stdev

from elastic_lsopt.errors import NonFinite, UserError
from elastic_lsopt.oracle.oracle import Oracle
from elastic_lsopt.probes.flatness.neighbourhood import refuse_not_positive
from elastic_lsopt.space.geometry import ParameterSpace
from elastic_lsopt.space.precision import full_precision
from elastic_lsopt.space.vector import Vector

GROWTH, STEPS = 1.2, 100
"""The walk's next step is so many times the last one; steps after which it gives up (8e7 first steps away)."""


@dataclass(frozen=True)
class MeanValley:
    """`value` is the mean width, `widths` one a worker, `loss` that of the mean of the workers.

    `standard_error` is by the spread over workers. `relaxation`, the mean distance of the workers from their mean, is
    what DPPF trains in the width's place.
    """

    value: float
    standard_error: float
    widths: tuple[float, ...]
    relaxation: float
    loss: float
    forwards: int
    seconds: float

    @property
    def inverse(self) -> float:
        """1 / value: larger where the valley is narrow."""
        return 1 / self.value


@full_precision()
def mean_valley(
    space: ParameterSpace,
    oracle: Oracle,
    *,
    workers: Sequence[Vector],
    kappa: float = 2.0,
    step: float = 0.1,
    tolerance: float = 1e-6,
) -> MeanValley:
    """The width along each of at least 2 workers' directions from their mean; kappa > 1 (collective).

    `step` > 0 is the walk's first step as a share of the worker's distance, `tolerance` > 0 the relative error of a
    width. The weights themselves count only if they are among the workers. Raises UserError for a setting out of range,
    a worker at the mean, a loss at the mean that is not > 0, and a valley without that wall; NonFinite where the loss
    at the mean is inf or NaN.
    """
    if not (isfinite(kappa) and kappa > 1):
        raise UserError(f"kappa={kappa} must be a number > 1.")
    refuse_not_positive("step", step)
    refuse_not_positive("tolerance", tolerance)
    if len(workers) < 2:
        raise UserError(f"workers has {len(workers)} entries; a mean valley needs at least 2.")
    began, forwards = time.monotonic(), 0
    mean = space.zeros()
    for x in workers:
        mean.add_(x, alpha=1 / len(workers))
    to_mean = mean - space.weights
    widths, distances = [], []

    with space.perturbation() as walk:
        walk.move(to_mean)
        del to_mean

        def loss_at(d: Vector | None, t: float) -> float:
            nonlocal forwards
            forwards += 1
            if d is None:
                return oracle.loss()
            with space.perturbed(d, t):
                return oracle.loss()

        base = loss_at(None, 0.0)
        for x in workers if isfinite(base) and base > 0 else ():
            d = x - mean
            distances.append(space.norm(d))
            if not distances[-1]:
                widths.append(0.0)
                continue
            d.mul_(1 / distances[-1])
            widths.append(_first(lambda t, d=d: loss_at(d, t), kappa * base, step * distances[-1], tolerance))
    if not isfinite(base):
        raise NonFinite(f"the loss at the mean of the workers is {base}.")
    if not base > 0:
        raise UserError(f"the loss at the mean of the workers is {base}; mean valley needs one > 0 to multiply.")
    for m, width in enumerate(widths):
        if width == 0:
            raise UserError(
                f"worker {m} is at the mean of the workers, so it gives no direction; let them train apart."
            )
        if width == float("inf"):
            raise UserError(f"the loss never grows {kappa}-fold towards worker {m}; use a smaller kappa.")
    error = stdev(widths) / sqrt(len(widths))
    seconds = time.monotonic() - began
    return MeanValley(fmean(widths), error, tuple(widths), fmean(distances), base, forwards, seconds)


def _first(loss: Callable[[float], float], wall: float, step: float, tolerance: float) -> float:
    """Where the walk meets the wall (inf: nowhere); a loss that is inf or NaN is beyond it."""
    low, high = 0.0, step
    for _ in range(STEPS):
        if not loss(high) < wall:
            break
        low, step = high, step * GROWTH
        high += step
    else:
        return float("inf")
    while high - low > tolerance * high:
        t = (low + high) / 2
        low, high = (t, high) if loss(t) < wall else (low, t)
    return (low + high) / 2
