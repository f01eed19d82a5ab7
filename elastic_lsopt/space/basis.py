"""Many vectors as the rows of one matrix, sharded like any vector: block products in one all-reduce.

c = Q v      coefficients, small and the same on all ranks
v - Q' c     taken off, local
C Q          combinations, local
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from elastic_lsopt.space.geometry import ParameterSpace
from elastic_lsopt.space.vector import Vector

SPAN = 65_536
"""Columns that are summed in the vectors' own precision; the sums of the spans are added in fp64."""


class Basis:
    """Up to `capacity` vectors. Memory: capacity numbers an element of this rank's share, 1/N of the space each.

    `device` "cpu" keeps them in host memory, where there is more room; what is asked of them then travels.
    """

    def __init__(self, space: ParameterSpace, capacity: int, device: torch.device | str | None = None) -> None:
        self.space = space
        self._device = torch.device(device) if device is not None else space.shards.device
        self._rows = torch.empty(capacity, space.layout.local_numel, dtype=space.dtype, device=self._device)
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Vector]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, i: int) -> Vector:
        """The i-th vector, a copy."""
        if not -self._count <= i < self._count:
            raise IndexError(f"vector {i} of a basis of {self._count}")
        return self._vector(self._rows[i % self._count])

    @property
    def local_bytes(self) -> int:
        """Bytes that this rank holds of it."""
        return self._rows.numel() * self._rows.element_size()

    def append(self, v: Vector) -> None:
        """Keep a copy of v. Raises IndexError where the basis is full."""
        self._rows[self._count] = self._flat(v)
        self._count += 1

    def resize(self, count: int) -> None:
        """Keep the first `count` vectors only."""
        self._count = count

    def coefficients(self, v: Vector) -> Tensor:
        """<q_i, v> of every vector, fp64 (count,) on the CPU, the same on all ranks; one all-reduce."""
        return self.products(_row(self._flat(v)))[:, 0]

    def gram(self, other: Basis | None = None) -> Tensor:
        """<q_i, p_j> with the vectors of another basis (default: its own), fp64 (count, other's); one all-reduce."""
        return self.products((other or self)._rows[: len(other or self)])

    def products(self, rows: Tensor) -> Tensor:
        """<q_i, r_j> with this rank's part of other vectors (m, local), fp64 (count, m); one all-reduce."""
        mine = self._rows[: self._count]
        total = torch.zeros(self._count, len(rows), dtype=torch.float64, device=self._device)
        for q, r in zip(mine.split(SPAN, dim=1), rows.to(self._device).split(SPAN, dim=1), strict=True):
            total += (q @ r.T).double()
        self.space.check_generation()
        return self.space.shards.sum_pieces_(total.to(self.space.shards.device)).cpu()

    def take_off_(self, v: Vector, coefficients: Tensor) -> Vector:
        """v -= sum_i coefficients_i q_i, in place; no communication."""
        c = coefficients.to(self._rows.dtype).to(self._device)
        step = self._vector(c @ self._rows[: self._count])
        return v.add_(step, alpha=-1.0)

    def orthogonalise_(self, v: Vector) -> Tensor:
        """Take off v what lies in the span of orthonormal vectors, twice (once leaves rounding; Kahan and Parlett).

        Returns the coefficients, fp64 (count,); two all-reduces.
        """
        first = self.coefficients(v)
        self.take_off_(v, first)
        second = self.coefficients(v)
        self.take_off_(v, second)
        return first + second

    def combine(self, coefficients: Tensor) -> Vector:
        """sum_i coefficients_i q_i, as an own vector; no communication."""
        return self._vector(coefficients.to(self._rows.dtype).to(self._device) @ self._rows[: self._count])

    def combine_all_(self, coefficients: Tensor) -> None:
        """Replace the vectors by C Q, C (m, count) with m <= capacity; in place, span by span; no communication."""
        c = coefficients.to(self._rows.dtype).to(self._device)
        for begin in range(0, self._rows.shape[1], SPAN):
            span = slice(begin, begin + SPAN)
            self._rows[: len(c), span] = c @ self._rows[: self._count, span]
        self._count = len(c)

    def _flat(self, v: Vector) -> Tensor:
        tensors = v.tensors
        if not tensors:
            return self._rows.new_empty(0)
        return torch.cat([t.to(self._rows.dtype) for t in tensors]).to(self._device)

    def _vector(self, row: Tensor) -> Vector:
        out = self.space.empty()
        lengths = [piece.length for piece in self.space.layout.pieces]
        torch._foreach_copy_(out.tensors, list(row.to(self.space.shards.device).split(lengths)))
        return out


def _row(flat: Tensor) -> Tensor:
    return flat[None, :]
