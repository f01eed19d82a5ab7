"""Many vectors as the rows of one matrix, sharded like any vector: block products in one all-reduce.

c = Q v      coefficients, small and the same on all ranks
v - Q' c     taken off, local
C Q          combinations, local
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from elastic_lsopt.space.geometry import ParameterSpace
from elastic_lsopt.space.precision import full_precision
from elastic_lsopt.space.vector import Vector

SPAN = 65_536
"""Columns that are summed in the vectors' own precision; the sums of the spans are added in fp64."""
BLOCK = 8
"""Vectors for which memory is taken at once."""


class Basis:
    """Up to `capacity` vectors. Memory: a number an element of this rank's share for each vector that it has held at a
    time, 1/N of the space each, taken in blocks of BLOCK vectors as they come and kept for the next.

    `device` "cpu" keeps them in host memory, where there is more room; what is asked of them then travels. Products are
    exact to the vectors' own precision, also where the user's matrix products are not.
    """

    def __init__(self, space: ParameterSpace, capacity: int, device: torch.device | str | None = None) -> None:
        self.space = space
        self.capacity = capacity
        self._device = torch.device(device) if device is not None else space.shards.device
        self._blocks: list[Tensor] = []
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Vector]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, i: int) -> Vector:
        """The i-th vector, a copy."""
        if not -self._count <= i < self._count:
            raise IndexError(f"vector {i} of a basis of {self._count}")
        return self._vector(self._row(i % self._count))

    @property
    def local_bytes(self) -> int:
        """Bytes that this rank holds of it."""
        return sum(block.numel() * block.element_size() for block in self._blocks)

    def append(self, v: Vector) -> None:
        """Keep a copy of v. Raises IndexError where the basis is full."""
        self._room_for(self._count + 1)
        at = 0
        row = self._row(self._count)
        for t in v.tensors:
            row[at : at + t.numel()].copy_(t)
            at += t.numel()
        self._count += 1

    def resize(self, count: int) -> None:
        """Keep the first `count` vectors only."""
        self._count = count

    def coefficients(self, v: Vector) -> Tensor:
        """<q_i, v> of every vector, fp64 (count,) on the CPU, the same on all ranks; one all-reduce."""
        return self._products([self._flat(v)[None, :]])[:, 0]

    def gram(self, other: Basis | None = None) -> Tensor:
        """<q_i, p_j> with the vectors of another basis (default: its own), fp64 (count, other's); one all-reduce."""
        return self._products((self if other is None else other)._held)

    @full_precision()
    def _products(self, others: Sequence[Tensor]) -> Tensor:
        """<q_i, r_j> with this rank's part of other vectors, rows of several matrices, fp64; one all-reduce."""
        mine = self._held
        total = torch.zeros(self._count, sum(len(r) for r in others), dtype=torch.float64, device=self._device)
        for begin in range(0, self._length if total.numel() else 0, SPAN):
            span = slice(begin, begin + SPAN)
            right = _rows([r[:, span].to(self._device) for r in others])
            total += _rows([q[:, span] @ right.T for q in mine]).double()
        self.space.check_generation()
        return self.space.shards.sum_pieces_(total.to(self.space.shards.device)).cpu()

    def project_out_(self, v: Vector, coefficients: Tensor) -> Vector:
        """v -= sum_i coefficients_i q_i, in place; no communication."""
        return v.add_(self.combine(coefficients), alpha=-1.0)

    def orthogonalise_(self, v: Vector) -> Tensor:
        """Take off v what lies in the span of orthonormal vectors, twice (once leaves rounding; Kahan and Parlett).

        Returns the coefficients, fp64 (count,); two all-reduces.
        """
        first = self.coefficients(v)
        self.project_out_(v, first)
        second = self.coefficients(v)
        self.project_out_(v, second)
        return first + second

    @full_precision()
    def combine(self, coefficients: Tensor) -> Vector:
        """sum_i coefficients_i q_i, as an own vector; no communication."""
        c = coefficients.to(self.space.dtype).to(self._device)
        total = torch.zeros(self._length, dtype=self.space.dtype, device=self._device)
        for i, block in enumerate(self._held):
            total.addmv_(block.T, c[i * BLOCK : i * BLOCK + len(block)])
        return self._vector(total)

    @full_precision()
    def combine_all_(self, coefficients: Tensor) -> None:
        """Replace the vectors by C Q, C (m, count) with m <= capacity; in place, span by span; no communication."""
        c = coefficients.to(self.space.dtype).to(self._device)
        self._room_for(len(c))
        before = self._held
        self._count = len(c)
        after = self._held
        for begin in range(0, self._length, SPAN):
            span = slice(begin, begin + SPAN)
            combined = c @ _rows([q[:, span] for q in before])
            for i, block in enumerate(after):
                block[:, span] = combined[i * BLOCK : i * BLOCK + len(block)]

    @property
    def _length(self) -> int:
        return self.space.layout.local_numel

    @property
    def _held(self) -> list[Tensor]:
        """The vectors as rows of matrices of BLOCK rows, the last of fewer."""
        return [block[: self._count - i * BLOCK] for i, block in enumerate(self._blocks) if self._count > i * BLOCK]

    def _row(self, i: int) -> Tensor:
        return self._blocks[i // BLOCK][i % BLOCK]

    def _room_for(self, count: int) -> None:
        """Take blocks until so many vectors fit. Raises IndexError beyond the capacity."""
        if count > self.capacity:
            raise IndexError(f"{count} vectors do not fit into a basis of capacity {self.capacity}")
        while (room := len(self._blocks) * BLOCK) < count:
            rows = min(BLOCK, self.capacity - room)
            self._blocks.append(torch.empty(rows, self._length, dtype=self.space.dtype, device=self._device))

    def _flat(self, v: Vector) -> Tensor:
        tensors = v.tensors
        if not tensors:
            return torch.empty(0, dtype=self.space.dtype, device=self._device)
        return torch.cat([t.to(self.space.dtype) for t in tensors]).to(self._device)

    def _vector(self, row: Tensor) -> Vector:
        out = self.space.empty()
        lengths = [piece.length for piece in self.space.layout.pieces]
        torch._foreach_copy_(out.tensors, list(row.to(self.space.shards.device).split(lengths)))
        return out


def _rows(matrices: Sequence[Tensor]) -> Tensor:
    """One above the other."""
    return matrices[0] if len(matrices) == 1 else torch.cat(list(matrices))
