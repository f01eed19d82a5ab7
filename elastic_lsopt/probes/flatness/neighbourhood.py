"""The loss around the weights, along directions and under noise: what the measures without a Hessian are made of.

    L(w + s d)              d a direction, s how far
    L(w + s p d)            `normalised`: in the coordinates where every filter has length 1, `filter_norms.py`

Cost: one forward a point, one pass a gradient; memory: one shard while perturbed, and with `normalised` two vectors.
Communication: that of a forward; on ZeRO one gather of the weights a point.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from math import isfinite

from elastic_lsopt.errors import NonFinite, UserError
from elastic_lsopt.oracle.oracle import Oracle
from elastic_lsopt.probes.flatness.filter_norms import filter_norms
from elastic_lsopt.probes.spectrum.operator import FIRST_DRAW
from elastic_lsopt.space.direction import Noise
from elastic_lsopt.space.geometry import ParameterSpace
from elastic_lsopt.space.vector import Vector


class Neighbourhood:
    """`loss` is the loss at the weights, `norms` the coordinates' p (None: 1), `forwards` and `gradients` the cost.

    Raises NonFinite where the loss at the weights is inf or NaN.
    """

    def __init__(self, space: ParameterSpace, oracle: Oracle, normalised: bool = False) -> None:
        self.space, self.oracle = space, oracle
        self.forwards, self.gradients = 0, 0
        self._began = time.monotonic()
        self.norms = filter_norms(space) if normalised else None
        self.loss = self._value()
        self.refuse_not_finite(self.loss, "at the weights")

    @property
    def seconds(self) -> float:
        """Since it was made."""
        return time.monotonic() - self._began

    def gradient(self) -> Vector:
        """The gradient by these coordinates, an own vector; one pass."""
        self.gradients += 1
        g = self.oracle.gradient().clone()
        return g if self.norms is None else g.mul_(self.norms)

    def at(self, direction: Vector | Noise, scale: float) -> float:
        """L at w + scale * direction; inf and NaN are returned as they are (collective)."""
        if self.norms is not None:
            direction = (direction.vector() if isinstance(direction, Noise) else direction) * self.norms
        with self.space.perturbed(direction, scale):
            return self._value()

    def noisy(self, draw: int, sigma: float) -> float:
        """L at w + sigma z, z standard normal: the same draw at any world size; no memory for z where p is 1."""
        return self.at(self.space.noise(0, FIRST_DRAW + draw), sigma)

    def finite(self, value: float, where: str) -> float:
        """The value. Raises NonFinite, on all ranks alike, where it is inf or NaN."""
        self.refuse_not_finite(value, where)
        return value

    def refuse_not_finite(self, value: float, where: str) -> None:
        if not isfinite(value):
            raise NonFinite(f"the loss {where} is {value}.")

    def _value(self) -> float:
        self.forwards += 1
        return self.oracle.loss()


@contextmanager
def resynced(space: ParameterSpace) -> Iterator[None]:
    """Where all ranks raise NonFinite inside a perturbation, make the weights right before it goes on (collective)."""
    try:
        yield
    except NonFinite:
        space.resync()
        raise


def refuse_not_positive(name: str, value: float) -> None:
    """Raise UserError for a setting that is not a finite number > 0."""
    if not (isfinite(value) and value > 0):
        raise UserError(f"{name}={value} must be a number > 0.")


def refuse_below_one(name: str, value: int) -> None:
    """Raise UserError for a count below 1."""
    if value < 1:
        raise UserError(f"{name}={value} must be >= 1.")
