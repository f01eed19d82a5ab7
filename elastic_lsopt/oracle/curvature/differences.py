"""Hessian products by central differences, with a step that is chosen by measuring.

    D(h) = (g(w + h v) - g(w - h v)) / 2h = H v + O(h^2) + rounding of the order of eps |g| / h

The length h |v| begins long and is halved as long as D(h) and D(h / 2) come nearer to each other; the last pair's
distance is the error estimate. Two gradients a product, in the space's precision whatever the engine's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from elastic_lsopt.errors import NonFinite
from elastic_lsopt.space.geometry import ParameterSpace
from elastic_lsopt.space.vector import Vector

HALVINGS = 12
LONGEST = 0.3
"""First length, as a multiple of eps^(1/3) |w|: the best one is shorter wherever it was measured."""


class Product(Vector):
    """A product with a curvature matrix. `relative_error` estimates |error| / |product|; None: exact to rounding."""

    def __init__(self, space: ParameterSpace, tensors: Sequence[Tensor], relative_error: float | None) -> None:
        super().__init__(space, tensors)
        self.relative_error = relative_error


class Differences:
    """Products at one point; the step is chosen at the first one (up to 2 (HALVINGS + 1) gradients) and used for all.

    `difference(v, h)` is D(h).
    """

    def __init__(self, space: ParameterSpace, difference: Callable[[Vector, float], Vector]) -> None:
        self.space, self._difference = space, difference
        self.length: float | None = None
        """h |v|, in units of the weights."""
        self.relative_error: float | None = None

    def product(self, v: Vector) -> Product:
        norm = self.space.norm(v)
        if norm == 0.0:
            return Product(self.space, self.space.zeros().tensors, 0.0)
        if self.length is None:
            return self._choose(v, norm)
        return Product(self.space, self._difference(v, self.length / norm).tensors, self.relative_error)

    def _choose(self, v: Vector, norm: float) -> Product:
        eps = torch.finfo(self.space.dtype).eps
        length = LONGEST * eps ** (1 / 3) * max(self.space.norm(self.space.weights), 1.0)
        before, best = self._difference(v, length / norm), None
        error, ended = float("inf"), 0
        for _ in range(HALVINGS):
            length /= 2
            now = self._difference(v, length / norm)
            size, distance = self.space.norm(now), self.space.norm(now - before)
            if distance < error:
                error, best, self.length, ended = distance, now, length, 0
                self.relative_error = distance / size if size else 0.0
            else:
                ended += 1
            if ended == 2 or distance == 0.0:
                break
            before = now
        if best is None:
            raise NonFinite("central differences: no step gives a finite product; the gradient is inf or NaN nearby.")
        return Product(self.space, best.tensors, self.relative_error)
