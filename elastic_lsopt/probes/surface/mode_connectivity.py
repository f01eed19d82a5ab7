"""The loss along a path from one point of the space to another, and the height of the barrier on it.

    line      p(t) = (1 - t) a + t b                              t in [0, 1]
    bezier    p(t) = (1 - t)^2 a + 2 t (1 - t) c + t^2 b          c <- c - eta 2 t (1 - t) grad L(p(t)),  t ~ U(0, 1)
    barrier   max_t  L(p(t)) - (1 - t) L(a) - t L(b)
    instability   max_t L(p(t)) - (L(a) + L(b)) / 2

Garipov, Izmailov, Podoprikhin, Vetrov, Wilson 2018, "Loss Surfaces, Mode Connectivity, and Fast Ensembling of DNNs"
(curve); Frankle, Dziugaite, Roy, Carbin 2020, "Linear Mode Connectivity and the Lottery Ticket Hypothesis"
(instability, over the mean of the ends); Entezari, Sedghi, Saukh, Neyshabur 2022, "The Role of Permutation Invariance
in Linear Mode Connectivity of Neural Networks" (barrier, over their interpolation; the same where both ends are equal).
Differs from Garipov's code: plain SGD without momentum or weight decay, and the oracle's batch instead of fresh ones.
Cost: one forward a point, one gradient a step of the curve; memory: c, p and one vector while away from the weights;
communication: that of two moves and a pass a point.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from math import inf, isfinite
from random import Random
from typing import Literal

from elastic_lsopt.errors import NonFinite, UserError
from elastic_lsopt.oracle.oracle import Oracle
from elastic_lsopt.space.geometry import ParameterSpace
from elastic_lsopt.space.perturbation import Perturbation
from elastic_lsopt.space.precision import full_precision
from elastic_lsopt.space.vector import Vector

Curve = Literal["line", "bezier"]


@dataclass(frozen=True)
class Path:
    """`losses[i]` is the loss at p(times[i]); the barrier and the instability are what the points show.

    `barrier_error` estimates what the top between two points adds to either (from the parabola through the top three).
    `bend` is c, and `training` the loss before each of its steps (None and empty for a line).
    """

    curve: Curve
    times: tuple[float, ...]
    losses: tuple[float, ...]
    barrier: float
    barrier_error: float
    instability: float
    distance: float
    bend: Vector | None
    training: tuple[float, ...]
    gradients: int
    forwards: int
    seconds: float


@full_precision()
def mode_connectivity(
    space: ParameterSpace,
    oracle: Oracle,
    *,
    start: Vector,
    end: Vector,
    curve: Curve = "line",
    points: int = 21,
    steps: int = 100,
    learning_rate: float = 0.1,
    seed: int = 0,
    bend: Vector | None = None,
) -> Path:
    """The loss at `points` >= 2 equal steps of t from `start` to `end`, both ends exact (collective).

    For a curve: `steps` >= 0 of SGD at `learning_rate` > 0 on c, which begins at `bend` (default: half-way); `seed`
    fixes the draws of t. The weights are back bit for bit.
    Raises UserError for a value out of range, NonFinite where the loss at an end or a gradient of the curve is.
    """
    began = time.monotonic()
    _refuse(curve, points, steps, learning_rate)
    training: list[float] = []
    with space.perturbation() as perturbation:
        walk = _Walk(perturbation, space.weights)
        if curve == "bezier":
            bend = (start + end).mul_(0.5) if bend is None else bend.clone()
            failure = _train(oracle, walk, start, bend, end, training, steps, learning_rate, seed)
        else:
            bend, failure = None, None
        times = [i / (points - 1) for i in range(points)]
        losses = [_loss_at(oracle, walk, _point(start, bend, end, t)) for t in times] if failure is None else []
    # Raised only here: inside the perturbation it would leave the weights' copies in doubt until `resync()`.
    if failure is not None:
        raise failure
    if not isfinite(losses[0] + losses[-1]):
        raise NonFinite(f"the losses at the ends of the path are {losses[0]} and {losses[-1]}.")
    # A NaN on the way is a barrier without a top.
    heights = [loss if isfinite(loss) else inf for loss in losses]
    above = [h - (1 - t) * losses[0] - t * losses[-1] for t, h in zip(times, heights, strict=True)]
    distance = space.norm(end - start)
    return Path(
        curve, tuple(times), tuple(losses), max(above), _between(above),
        max(heights) - (losses[0] + losses[-1]) / 2, distance, bend, tuple(training), len(training), points,
        time.monotonic() - began,
    )  # fmt: skip


class _Walk:
    """The weights set to whole points, exactly: w - w = 0, 0 + p = p, p - p = 0, where w + (p - w) would round."""

    def __init__(self, perturbation: Perturbation, weights: Vector) -> None:
        self._perturbation, self._here = perturbation, weights.clone()

    def to(self, weighted: list[tuple[float, Vector]]) -> None:
        """Set the weights to the sum of the weighted vectors."""
        self._perturbation.move(self._here, -1.0)
        self._here.zero_()
        for weight, v in weighted:
            if weight:
                self._here.add_(v, alpha=weight)
        self._perturbation.move(self._here)


def _point(start: Vector, bend: Vector | None, end: Vector, t: float) -> list[tuple[float, Vector]]:
    if bend is None:
        return [(1 - t, start), (t, end)]
    return [((1 - t) ** 2, start), (2 * t * (1 - t), bend), (t**2, end)]


def _loss_at(oracle: Oracle, walk: _Walk, point: list[tuple[float, Vector]]) -> float:
    walk.to(point)
    return oracle.loss()


def _train(
    oracle: Oracle,
    walk: _Walk,
    start: Vector,
    bend: Vector,
    end: Vector,
    training: list[float],
    steps: int,
    learning_rate: float,
    seed: int,
) -> NonFinite | None:
    """SGD on `bend`, in place; the losses go to `training`. What went wrong is returned, the same on all ranks."""
    times = Random(seed)
    for _ in range(steps):
        t = times.random()
        walk.to(_point(start, bend, end, t))
        try:
            gradient = oracle.gradient()
        except NonFinite as error:
            return error
        bend.add_(gradient, alpha=-learning_rate * 2 * t * (1 - t))
        training.append(oracle.losses[-1])
    return None


def _between(values: list[float]) -> float:
    """How far the parabola through the highest value and its neighbours rises above that value; 0 at an end."""
    top = values.index(max(values))
    if top in (0, len(values) - 1):
        return 0.0
    left, middle, right = values[top - 1 : top + 2]
    curvature = 2 * middle - left - right
    if not isfinite(curvature):
        return float("nan")
    return (right - left) ** 2 / (8 * curvature) if curvature > 0 else 0.0


def _refuse(curve: str, points: int, steps: int, learning_rate: float) -> None:
    if curve not in ("line", "bezier"):
        raise UserError(f"curve={curve!r} is unknown; use line or bezier.")
    if points < 2:
        raise UserError(f"points={points} must be >= 2: both ends.")
    if steps < 0:
        raise UserError(f"steps={steps} must be >= 0.")
    if not (learning_rate > 0 and isfinite(learning_rate)):
        raise UserError(f"learning_rate={learning_rate} must be a finite number > 0.")
