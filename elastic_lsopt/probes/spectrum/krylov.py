"""The Lanczos recurrence with full re-orthogonalisation: an orthonormal basis Q in which the matrix is small.

    A Q = Q M + q c'        q the next vector, of length 1 and orthogonal to Q
    M = tridiagonal, c = beta e_m           before a restart
    M = diagonal + coupling, c = beta s_m   after a thick one (the rows of the kept Ritz vectors)

M is not made symmetric: it keeps what re-orthogonalising took off, so the relation holds to rounding also where
products are only nearly symmetric (central differences), and |A x - theta x| follows without another product.

Lanczos 1950, "An iteration method for the solution of the eigenvalue problem …"; Wu and Simon 2000, "Thick-restart
Lanczos method for large symmetric eigenvalue problems". Cost: a product a step; memory: 4 vectors and the basis, which
grows with the steps to its capacity; three all-reduces a step. Neighbours are taken off first, then all vectors once,
and again while the length still drops by more than half (Daniel, Gragg, Kaufman and Stewart 1976).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import hypot, isfinite, sqrt

import torch
from torch import Tensor

from elastic_lsopt.errors import NonFinite
from elastic_lsopt.probes.spectrum.operator import Operator
from elastic_lsopt.space.basis import Basis
from elastic_lsopt.space.vector import Vector

INVARIANT = 3 / 4
"""A remainder below eps^(3/4) |A| is rounding, and the basis spans an invariant space: 8,000 eps in fp64, where the
divisions by small betas before it were measured to leave up to 600; 54 in fp32, where more ends a bulk too soon."""
FRESH = 1 << 19
"""Draws of directions that go on from an invariant space: none is a probe's own."""


@dataclass(frozen=True)
class Ritz:
    """Eigenvalues of the small matrix, ascending, its eigenvectors (columns) and |A x - theta x| of each; fp64."""

    values: Tensor
    columns: Tensor
    residuals: Tensor


class Krylov:
    """Up to `capacity` vectors from `start` on (taken over; any length but 0). `rows` may give the memory for them."""

    def __init__(
        self,
        a: Operator,
        start: Vector,
        capacity: int,
        device: torch.device | str | None = None,
        rows: Basis | None = None,
    ) -> None:
        self.a = a
        self.capacity = capacity
        self.basis = rows if rows is not None else Basis(a.space, capacity, device)
        self.basis.resize(0)
        self.newest = 0
        """Index of the first vector since the last invariant space."""
        self.invariant = False
        self._matrix = torch.zeros(capacity, capacity, dtype=torch.float64)
        self._coupling = torch.zeros(0, dtype=torch.float64)
        self._next = start.mul_(1 / a.space.norm(start))
        self._last: Vector | None = None
        self._scale = 0.0
        self._lost = 0.0
        self._draws = 0

    def __len__(self) -> int:
        return len(self.basis)

    @property
    def matrix(self) -> Tensor:
        """M, fp64 (steps, steps), the same on all ranks."""
        return self._matrix[: len(self), : len(self)]

    @property
    def complete(self) -> bool:
        """Whether the basis spans the whole space: M has the spectrum of A."""
        return len(self) == self.a.dimension

    def step(self) -> None:
        """One product, one vector more (collective). Goes on from a random direction where the space is invariant."""
        a, basis, m = self.a, self.basis, len(self)
        if self.invariant:
            self._renew()
        q = self._next
        basis.append(q)
        w = a(q)
        column = torch.zeros(m + 1, dtype=torch.float64)
        column[m] = a.dot(q, w)
        w.add_(q, alpha=-float(column[m]))
        if m:
            column[:m] = self._coupling
            if self._last is not None:
                w.add_(self._last, alpha=-float(self._coupling[-1]))
            elif self._coupling.any():
                basis.project_out_(w, torch.cat([self._coupling, torch.zeros(1, dtype=torch.float64)]))
            self._matrix[m, :m] = self._coupling
        beta = self._project_out(w, column)
        self._matrix[: m + 1, m] = column
        self._scale = max(self._scale, hypot(float(torch.linalg.vector_norm(column)), beta))
        self.invariant = beta <= torch.finfo(a.space.dtype).eps ** INVARIANT * self._scale
        self._coupling = torch.zeros(m + 1, dtype=torch.float64)
        if self.invariant:
            self._lost = hypot(self._lost, beta)
        else:
            self._coupling[m] = beta
            self._next = w.mul_(1 / beta)
        self._last = q

    def _project_out(self, w: Vector, column: Tensor) -> float:
        """Take the basis off w and add its coefficients to `column`; the length that is left."""
        enough, left = 0.0, 0.0
        for passes in range(4):
            more = self.basis.coefficients(w)
            self.basis.project_out_(w, more)
            column += more
            left = self.a.space.norm(w)
            if not isfinite(left):
                raise NonFinite(
                    f"product {self.a.products} with the curvature is inf or NaN: the loss is not smooth here."
                )
            if passes == 0:
                enough = hypot(left, float(torch.linalg.vector_norm(column))) / 10
            if left >= enough:
                break
            enough = left / 2
        return left

    def _renew(self) -> None:
        """A random direction orthogonal to the basis; M falls into blocks."""
        v = self.a.direction(FRESH + self._draws)
        self._draws += 1
        for _ in range(2):
            self.basis.orthogonalise_(v)
            v.mul_(1 / self.a.space.norm(v))
        self._next, self._last, self.invariant, self.newest = v, None, False, len(self)

    def ritz(self) -> Ritz:
        """Eigenpairs of M's symmetric part, with honest residuals; no communication."""
        return self._ritz(0)

    def newest_ritz(self) -> Ritz:
        """Those of the part that was built since the last invariant space."""
        return self._ritz(self.newest)

    def _ritz(self, begin: int) -> Ritz:
        m = self.matrix[begin:, begin:]
        values, columns = torch.linalg.eigh((m + m.T) / 2)
        inside = torch.linalg.vector_norm(m @ columns - columns * values, dim=0)
        outside = self._coupling[begin:] @ columns
        return Ritz(values, columns, (inside.square() + outside.square() + self._lost**2).sqrt())

    def restart(self, columns: Tensor) -> None:
        """Keep only the Ritz vectors of these columns (steps, kept); no communication."""
        kept = columns.shape[1]
        image = self.matrix @ columns
        small = columns.T @ image
        self._lost = sqrt(self._lost**2 + float((image - columns @ small).square().sum()))
        self.basis.combine_all_(columns.T)
        self._matrix.zero_()
        self._matrix[:kept, :kept] = small
        self._coupling = self._coupling @ columns
        self.newest = kept if self.newest else 0
        self._last = None
