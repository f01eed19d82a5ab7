"""A symmetric matrix on the space that one can only multiply with: what spectra, traces and norms are taken of.

H          the Hessian of the mean loss                 of="hessian"
G          its generalised Gauss-Newton part            of="ggn"
P A P      either, on some parameters only              parameters="layers.0.*"
D A D      either, between a diagonal (1/sqrt of Adam's denominator: the preconditioned Hessian)
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from math import isfinite
from typing import Literal, TypedDict

from elastic_lsopt.errors import NonFinite, UserError
from elastic_lsopt.oracle.oracle import Oracle
from elastic_lsopt.space.geometry import ParameterSpace
from elastic_lsopt.space.precision import full_precision
from elastic_lsopt.space.vector import Vector

Matrix = Literal["hessian", "ggn"]
FIRST_DRAW = 1 << 20
"""Draws of probe vectors are numbered from here, so that they are not a method's noise of the same step."""


@dataclass
class Operator:
    """`apply` is the product; `parameters` the numbers of those that it acts on (None: all); all else is 0 in and out.

    `products` counts the products, `relative_error` is the largest error estimate among them (None: all exact),
    `seconds` the time since it was made.
    """

    space: ParameterSpace
    apply: Callable[[Vector], Vector]
    parameters: frozenset[int] | None = None
    products: int = 0
    relative_error: float | None = None
    _began: float = field(default_factory=time.monotonic)

    @property
    def dimension(self) -> int:
        """Rows of the matrix: elements of the parameters that it acts on."""
        every = self.space.layout.parameters
        return sum(p.numel for i, p in enumerate(every) if self.parameters is None or i in self.parameters)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began

    @full_precision()
    def __call__(self, v: Vector) -> Vector:
        """A v; v must be zero outside of the operator's parameters (`project_`)."""
        self.products += 1
        out = self.apply(v)
        error = getattr(out, "relative_error", None)
        if error is not None:
            self.relative_error = max(error, self.relative_error or 0.0)
        return self.project_(out)

    def project_(self, v: Vector) -> Vector:
        """Set v to zero outside of the operator's parameters."""
        if self.parameters is not None:
            for piece, t in zip(self.space.layout.pieces, v.tensors, strict=True):
                if piece.parameter not in self.parameters:
                    t.zero_()
        return v

    def gaussian(self, draw: int) -> Vector:
        """Standard normal numbers of (seed, draw, parameter, offset): the same at any world size."""
        return self.project_(self.space.noise(0, FIRST_DRAW + draw).vector())

    def signs(self, draw: int) -> Vector:
        """Rademacher numbers, +1 or -1: the signs of `gaussian`."""
        v = self.space.noise(0, FIRST_DRAW + draw).vector()
        for t in v.tensors:
            t.copy_(t.ge(0).to(t.dtype).mul_(2).sub_(1))
        return self.project_(v)

    def direction(self, draw: int) -> Vector:
        """A random direction of length 1."""
        v = self.gaussian(draw)
        return v.mul_(1 / self.space.norm(v))

    def refuse_fewer_than_one(self, name: str, value: int) -> None:
        """Raise UserError for a number of vectors or products below 1."""
        if value < 1:
            raise UserError(f"{name}={value} must be >= 1.")

    def refuse_more_than_there_is(self, name: str, value: int) -> None:
        """Raise UserError for a number of vectors beyond the dimension."""
        if not 1 <= value <= self.dimension:
            raise UserError(f"{name}={value} must be between 1 and {self.dimension}, the size of the space.")

    def dot(self, a: Vector, b: Vector) -> float:
        """<a, b>. Raises NonFinite, on all ranks alike, where it is inf or NaN."""
        value = self.space.dot(a, b)
        if not isfinite(value):
            raise NonFinite(f"product {self.products} with the curvature gave {value}: the loss is not smooth here.")
        return value


class On(TypedDict, total=False):
    """The matrix that a probe measures, as its keywords say it, and `operator`'s.

    `of` is "hessian", "ggn" or an Operator that is there already; `parameters` a pattern of names (`*`, `?`), where all
    others are held.
    """

    of: Matrix | Operator
    parameters: str | None


def operator(
    space: ParameterSpace, oracle: Oracle, *, of: Matrix | Operator = "hessian", parameters: str | None = None
) -> Operator:
    """The matrix that is meant, at the present weights; probes hand their keywords on to it.

    An Operator is returned as it is. Raises UserError for an unknown matrix and for a pattern that matches nothing.
    """
    if isinstance(of, Operator):
        return of
    if of not in ("hessian", "ggn"):
        raise UserError(f"of={of!r} is unknown; use hessian or ggn.")
    chosen = None if parameters is None else matching(space, parameters)
    return Operator(space, oracle.hvp if of == "hessian" else oracle.ggn_vp, chosen)


def matching(space: ParameterSpace, pattern: str) -> frozenset[int]:
    """The numbers of the parameters whose names match (as file names do). Raises UserError where none does."""
    names = [p.name for p in space.layout.parameters]
    found = frozenset(i for i, name in enumerate(names) if fnmatchcase(name, pattern))
    if not found:
        raise UserError(f"parameters={pattern!r} matches none of the {len(names)} names, such as {names[0]!r}.")
    return found
