"""SAM's sharpness: how far the loss rises within a ball around the weights.

    max  L(w + T u) - L(w)     over |u| <= rho          T = 1, or |w| (adaptive);  |.| the L2 or the Linf norm

    one step      u = rho T g / |T g|  (L2),   rho sign(T g)  (Linf): SAM's and ASAM's own first step
    more steps    z = P(u_k + s d(u_k)),  u_{k+1} = 3/4 z + 1/4 u_{k-1}     d = the step above for rho = 1, P onto the
                  ball, s from 2 rho, halved at APGD's checkpoints where progress is slow; then on from the best u

Foret, Kleiner, Mobahi, Neyshabur 2021, "Sharpness-Aware Minimization …"; Kwon, Kim, Park, Choi 2021, "ASAM …";
Andriushchenko, Croce, Mueller, Hein, Flammarion 2023, "A Modern Look at the Relationship between Sharpness and
Generalization", whose evaluator's schedule, momentum and step sizes these are (rho = 0.001, 20 steps, batches of 128).
Differs from the evaluator in: 1. the ball is that of this oracle's batch: its m is the batch, to be averaged over
batches by who asks; 2. in adaptive L2 steps and projections are taken on u, where the ellipsoid is a ball (ASAM's
geometry), and not by a search for a multiplier; 3. a halved step goes on from the best point itself; 4. it starts at
the weights, and from random points only where asked.

Cost: `steps` gradients (times 1 + starts) and a forward each start; memory: four vectors and one shard while
perturbed (adaptive: one more); communication: a pass's, one all-reduce a step.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from math import ceil, sqrt
from typing import Literal

import torch

from elastic_lsopt.errors import NonFinite, UserError
from elastic_lsopt.oracle.oracle import Oracle
from elastic_lsopt.probes.flatness.neighbourhood import refuse_below_one, refuse_not_positive, resynced
from elastic_lsopt.probes.spectrum.operator import FIRST_DRAW
from elastic_lsopt.space.geometry import ParameterSpace
from elastic_lsopt.space.precision import full_precision
from elastic_lsopt.space.vector import Vector

Norm = Literal["l2", "linf"]
MOMENTUM, SLOW = 0.75, 0.75
"""The share of the new point; the share of steps that must have found a higher loss for the step to stay long."""


@dataclass(frozen=True)
class SAMSharpness:
    """`value` = `worst_loss` - `loss`; of more than one step it is >= 0 and a lower bound of the maximum."""

    value: float
    loss: float
    worst_loss: float
    gradients: int
    forwards: int
    seconds: float


@full_precision()
def sam_sharpness(
    space: ParameterSpace,
    oracle: Oracle,
    *,
    rho: float = 0.05,
    steps: int = 1,
    norm: Norm = "l2",
    adaptive: bool = False,
    starts: int = 0,
) -> SAMSharpness:
    """Ascent by `steps` >= 1 in a ball of `rho` > 0, in units of the weights (adaptive: of each weight) (collective).

    `starts` >= 0 random starting points are tried beside the weights themselves. Raises UserError for a setting out of
    range and where the gradient is 0 and there is no random start, NonFinite where a loss or gradient is inf or NaN.
    """
    refuse_not_positive("rho", rho)
    refuse_below_one("steps", steps)
    if norm not in ("l2", "linf"):
        raise UserError(f"norm={norm!r} is unknown; use l2 or linf.")
    if starts < 0:
        raise UserError(f"starts={starts} must be >= 0.")
    ascent = _Ascent(space, oracle, rho, steps, norm, adaptive)
    with resynced(space):
        worst = [ascent.climb(None), *(ascent.climb(i) for i in range(starts))]
    worst = [x for x in worst if x is not None]
    if not worst:
        raise UserError("the gradient is 0, so there is no direction of ascent; give starts=1 or more.")
    return SAMSharpness(
        max(worst) - ascent.loss, ascent.loss, max(worst), ascent.gradients, ascent.forwards, ascent.seconds
    )  # fmt: skip


class _Ascent:
    def __init__(
        self, space: ParameterSpace, oracle: Oracle, rho: float, steps: int, norm: Norm, adaptive: bool
    ) -> None:
        self.space, self.oracle, self.rho, self.steps, self.norm = space, oracle, rho, steps, norm
        self.scale = space.weights.clone().abs_() if adaptive else None
        self.loss, self.gradients, self.forwards = 0.0, 0, 0
        self._began = time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began

    def climb(self, start: int | None) -> float | None:
        """The highest loss met on the way from the weights (None) or from a random point; None: there is no way up."""
        origin = start is None
        u = self.space.zeros() if origin else self._random(start)
        before, loss, d = u.clone(), 0.0, None
        loss, d = self._look(u, origin)
        if origin:
            self.loss = loss
        if d is None and origin:
            return None
        if self.steps == 1:
            return self._value(self._onto_ball(u.add_(d, alpha=self.rho)) if d is not None else u)
        best, highest = u.clone(), max(loss, self.loss)
        size, last_size, last_highest, last_check, found = 2 * self.rho, 2 * self.rho, highest, 0, 0
        checks = _checkpoints(self.steps)
        for i in range(self.steps):
            z = u.clone()
            if d is not None:
                self._onto_ball(z.add_(d, alpha=size))
            z.mul_(MOMENTUM).add_(before, alpha=1 - MOMENTUM)
            before, u = u, z
            if i + 1 < self.steps:
                loss, d = self._look(u, False)
            else:
                loss, d = self._value(u), None
            if loss > highest:
                highest, found = loss, found + 1
                best.copy_(u)
            if i in checks and i + 1 < self.steps:
                slow = found < SLOW * (i - last_check) or (last_size == size and last_highest == highest)
                last_size, last_highest, last_check, found = size, highest, i, 0
                if slow:
                    size /= 2
                    u.copy_(best)
                    before.copy_(best)
                    _, d = self._look(u, False)
        return highest

    def _look(self, u: Vector, origin: bool) -> tuple[float, Vector | None]:
        """Loss and direction of ascent at u; one gradient."""
        self.gradients += 1
        if origin:
            g = self.oracle.gradient().clone()
        else:
            with self.space.perturbed(self._step(u), 1.0):
                g = self.oracle.gradient().clone()
        if self.scale is not None:
            g.mul_(self.scale)
        length = self.space.norm(g)
        if not length:
            return self.oracle.losses[-1], None
        if self.norm == "linf":
            torch._foreach_sign_(g.tensors)
            return self.oracle.losses[-1], g
        return self.oracle.losses[-1], g.mul_(1 / length)

    def _value(self, u: Vector) -> float:
        self.forwards += 1
        with self.space.perturbed(self._step(u), 1.0):
            loss = self.oracle.loss()
        if not loss < float("inf"):
            raise NonFinite(f"the loss at a distance of rho={self.rho} is {loss}.")
        return loss

    def _step(self, u: Vector) -> Vector:
        return u if self.scale is None else u * self.scale

    def _onto_ball(self, u: Vector) -> Vector:
        if self.norm == "linf":
            for t in u.tensors:
                t.clamp_(-self.rho, self.rho)
            return u
        length = self.space.norm(u)
        return u.mul_(self.rho / length) if length > self.rho else u

    def _random(self, start: int) -> Vector:
        """On the sphere, or uniform in the cube: erf(z / sqrt 2) of a normal z is uniform in (-1, 1)."""
        z = self.space.noise(0, FIRST_DRAW + start).vector()
        if self.norm == "l2":
            return z.mul_(self.rho / self.space.norm(z))
        for t in z.tensors:
            t.div_(sqrt(2)).erf_().mul_(self.rho)
        return z


def _checkpoints(steps: int) -> set[int]:
    """Steps after which APGD looks at its progress (Croce and Hein 2020): at 22 % and then ever more often."""
    last, at, out = 0.0, 0.22, set[int]()
    while ceil(at * steps) < steps:
        out.add(ceil(at * steps))
        last, at = at, at + max(at - last - 0.03, 0.06)
    return out
