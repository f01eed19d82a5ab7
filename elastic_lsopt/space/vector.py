"""Vectors of a parameter space: one tensor a piece, arithmetic by `torch._foreach_*`, sums over all ranks in fp64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from elastic_lsopt.errors import StaleGradient
from elastic_lsopt.space.layout import Layout


class Owner(Protocol):
    """The space of a vector, as the vector needs it."""

    seed: int

    @property
    def layout(self) -> Layout: ...
    def empty(self) -> Vector: ...
    def check_generation(self) -> None: ...
    def norm(self, a: Vector) -> float: ...


def _fused(operation: Callable[..., object], mine: list[Tensor], *others: Any, **more: Any) -> None:
    """A `torch._foreach_*` on the pieces, which refuses an empty list: a rank may hold none of some parameters."""
    if mine:
        operation(mine, *others, **more)


class Vector:
    """A point or direction of the space: this rank's pieces (1-D tensors in the order of `space.layout.pieces`).

    Arithmetic is local and costs no communication; `dot` and the norms are methods of the space, because they are
    sums over all ranks. Methods that end in `_` change this vector.
    """

    def __init__(self, space: Owner, tensors: Sequence[Tensor]) -> None:
        self.space = space
        self._tensors = list(tensors)

    @property
    def tensors(self) -> list[Tensor]:
        """The pieces. Raises StaleGeneration after the space was rebuilt."""
        self.space.check_generation()
        return self._tensors

    def clone(self) -> Vector:
        """A copy in the space's own precision (fp32, or fp64 for fp64 weights): one number an element."""
        out = self.space.empty()
        _fused(torch._foreach_copy_, out.tensors, self.tensors)
        return out

    def _written(self) -> list[Tensor]:
        """The pieces, which are about to change."""
        return self.tensors

    def copy_(self, other: Vector) -> Vector:
        _fused(torch._foreach_copy_, self._written(), other.tensors)
        return self

    def zero_(self) -> Vector:
        _fused(torch._foreach_zero_, self._written())
        return self

    def add_(self, other: Vector | float, alpha: float = 1.0) -> Vector:
        """self += alpha * other."""
        if isinstance(other, Vector):
            _fused(torch._foreach_add_, self._written(), other.tensors, alpha=alpha)
        else:
            _fused(torch._foreach_add_, self._written(), other * alpha)
        return self

    def lerp_(self, other: Vector, weight: float) -> Vector:
        """self += weight * (other - self)."""
        mine, theirs = self._written(), other.tensors
        if all(a.dtype == b.dtype for a, b in zip(mine, theirs, strict=True)):
            _fused(torch._foreach_lerp_, mine, theirs, weight)
        else:
            for a, b in zip(mine, theirs, strict=True):
                a.lerp_(b.to(a.dtype), weight)
        return self

    def mul_(self, other: Vector | Scales | float) -> Vector:
        """self *= other, element by element; Scales of the model or of each parameter."""
        if isinstance(other, Scales):
            for piece, t in zip(self.space.layout.pieces, self._written(), strict=True):
                t.mul_(other.of(piece.parameter).to(t.dtype))
        else:
            _fused(torch._foreach_mul_, self._written(), other.tensors if isinstance(other, Vector) else other)
        return self

    def addcmul_(self, a: Vector, b: Vector, value: float = 1.0) -> Vector:
        """self += value * a * b, element by element."""
        _fused(torch._foreach_addcmul_, self._written(), a.tensors, b.tensors, value)
        return self

    def div_(self, other: Vector) -> Vector:
        """self /= other, element by element."""
        _fused(torch._foreach_div_, self._written(), other.tensors)
        return self

    def sqrt_(self) -> Vector:
        _fused(torch._foreach_sqrt_, self._written())
        return self

    def add_each_(self, other: Vector, alphas: Sequence[float]) -> Vector:
        """self += alpha * other, with an alpha for each parameter."""
        mine, theirs = self._written(), other.tensors
        for alpha, places in self._alike(alphas):
            torch._foreach_add_([mine[i] for i in places], [theirs[i] for i in places], alpha=alpha)
        return self

    def mul_each_(self, factors: Sequence[float]) -> Vector:
        """self *= a factor for each parameter, in the precision of this vector."""
        mine = self._written()
        for factor, places in self._alike(factors):
            torch._foreach_mul_([mine[i] for i in places], factor)
        return self

    def lerp_each_(self, other: Vector, weights: Sequence[float]) -> Vector:
        """self += weight * (other - self), with a weight for each parameter."""
        mine, theirs = self._written(), other.tensors
        for weight, places in self._alike(weights):
            part = Vector(self.space, [mine[i] for i in places])
            part.lerp_(Vector(self.space, [theirs[i] for i in places]), weight)
        return self

    def _alike(self, numbers: Sequence[float]) -> list[tuple[float, list[int]]]:
        """Each number that any of the parameters has, with the places of their pieces: one fused call a number."""
        places: dict[float, list[int]] = {}
        for i, piece in enumerate(self.space.layout.pieces):
            places.setdefault(numbers[piece.parameter], []).append(i)
        return [*places.items()]

    def pow_(self, exponent: float) -> Vector:
        _fused(torch._foreach_pow_, self._written(), exponent)
        return self

    def clamp_(self, low: float, high: float) -> Vector:
        """Each element within low and high."""
        _fused(torch._foreach_clamp_min_, self._written(), low)
        _fused(torch._foreach_clamp_max_, self._written(), high)
        return self

    def abs_(self) -> Vector:
        _fused(torch._foreach_abs_, self._written())
        return self

    def __add__(self, other: Vector) -> Vector:
        return self.clone().add_(other)

    def __sub__(self, other: Vector) -> Vector:
        return self.clone().add_(other, alpha=-1.0)

    def __mul__(self, other: Vector | float) -> Vector:
        return self.clone().mul_(other)

    __rmul__ = __mul__

    def __neg__(self) -> Vector:
        return self.clone().mul_(-1.0)

    @property
    def local_bytes(self) -> int:
        """Bytes that this rank holds of it."""
        return sum(t.numel() * t.element_size() for t in self.tensors)


class BorrowedGradient(Vector):
    """The engine's own gradient buffer, lent until the next backward pass: reading it later raises StaleGradient.

    It costs no memory. Keep the values with `.clone()`. `known_norm` is its global L2 norm, which the pass that made
    it has summed already; None once it has been written in place, so that clipping does not go by the old one.
    """

    def __init__(self, space: Owner, tensors: Sequence[Tensor], known_norm: float) -> None:
        super().__init__(space, tensors)
        self.known_norm: float | None = known_norm
        self.valid = True

    def _written(self) -> list[Tensor]:
        self.known_norm = None
        return self.tensors

    def end(self) -> None:
        """Let go of the buffer: else it would live on beside the one that the next pass fills."""
        self._tensors, self.valid = [], False

    @property
    def tensors(self) -> list[Tensor]:
        self.space.check_generation()
        if not self.valid:
            raise StaleGradient(
                "this gradient is borrowed from the engine's buffer and a later backward pass has changed it; "
                "call .clone() before the next pass to keep it."
            )
        return super().tensors


@dataclass(frozen=True)
class Scales:
    """One number for the model, or one a parameter or row of it (fp64, 1-D, the same on every rank).

    They stay on the device: what is computed of them and moved by them waits for nothing.
    """

    values: Tensor
    per: Literal["model", "parameter", "row"]

    def of(self, parameter: int) -> Tensor:
        """The number of one parameter, 0-d, on the device. Not for one a row."""
        assert self.per != "row"
        return self.values[0 if self.per == "model" else parameter]

    def __add__(self, number: float) -> Scales:
        return Scales(self.values + number, self.per)

    def __mul__(self, number: float) -> Scales:
        return Scales(self.values * number, self.per)

    __rmul__ = __mul__

    def __rtruediv__(self, number: float) -> Scales:
        return Scales(number / self.values, self.per)
