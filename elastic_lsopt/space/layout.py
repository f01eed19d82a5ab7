"""Where the pieces of the parameter vector lie.

All trainable parameters together are one vector. A rank holds some of it, in tensors that the framework owns (its
*slots*: a whole parameter, a DTensor's local shard, a flat ZeRO partition). A `Piece` is one contiguous run of one
parameter inside one slot; elements of a slot that no piece covers are padding and take part in nothing.

    parameter "b.weight" (11 x 13)      offset 0 ...... 70 ........ 143
    rank 0, slot 2                      [.., piece ....]
    rank 1, slot 2                                     [piece ........, padding]
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch
from torch import Tensor

from elastic_lsopt.space.dealing import Dealing

WRAPPERS = ("_checkpoint_wrapped_module.", "_orig_mod.")
"""What activation checkpointing and torch.compile put between a module's name and its child's."""


def plain_name(name: str) -> str:
    """A parameter's name in the model as the user wrote it: the same with and without those wrappers."""
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name


@dataclass(frozen=True)
class Parameter:
    """One trainable parameter as the user knows it: full name and full shape."""

    name: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def row_length(self) -> int:
        """Elements of a row (an output neuron, a filter); a bias or a norm's gain is one row in all."""
        return prod(self.shape[1:]) if len(self.shape) > 1 else max(self.numel, 1)

    @property
    def rows(self) -> int:
        return self.shape[0] if len(self.shape) > 1 else 1


@dataclass(frozen=True)
class Piece:
    """Elements [offset, offset + length) of a flattened parameter, at [start, start + length) of a flattened slot."""

    parameter: int
    offset: int
    length: int
    slot: int
    start: int


@dataclass(frozen=True)
class RowSpan:
    """Elements [begin, end) of a run: `rows` equal stretches of the parameter, the first of them in row `first`."""

    begin: int
    end: int
    first: int
    rows: int


def row_spans(offset: int, length: int, row_length: int) -> Iterator[RowSpan]:
    """Cut elements [offset, offset + length) of a parameter: the end of a row, whole rows, the beginning of a row."""
    at, end = offset, offset + length
    while at < end:
        row, inside = divmod(at, row_length)
        if inside or end - at < row_length:
            stop, rows = min(end, (row + 1) * row_length), 1
        else:
            rows = (end - at) // row_length
            stop = at + rows * row_length
        yield RowSpan(at - offset, stop - offset, row, rows)
        at = stop


@dataclass(frozen=True)
class Layout:
    """All parameters (the same on every rank, in the same order) and this rank's pieces of them."""

    parameters: tuple[Parameter, ...]
    pieces: tuple[Piece, ...]

    @cached_property
    def first_row(self) -> tuple[int, ...]:
        """The number of each parameter's first row when all rows of all parameters are counted through."""
        out, total = [], 0
        for p in self.parameters:
            out.append(total)
            total += p.rows
        return tuple(out)

    @cached_property
    def rows(self) -> int:
        return sum(p.rows for p in self.parameters)

    @cached_property
    def local_numel(self) -> int:
        return sum(piece.length for piece in self.pieces)

    @cached_property
    def numel(self) -> int:
        return sum(p.numel for p in self.parameters)

    @cached_property
    def row_spans(self) -> tuple[tuple[RowSpan, ...], ...]:
        """Each piece's row spans, rows counted from the parameter's own first row."""
        return tuple(
            tuple(row_spans(piece.offset, piece.length, self.parameters[piece.parameter].row_length))
            for piece in self.pieces
        )


class Shards(ABC):
    """What a backend supplies: where the pieces are, how copies are made right, how sums are formed.

    `masters` are the authoritative values, `working` the rank's own part of what the next forward sees; where the
    framework keeps no separate master the two are the same tensors. Both are 1-D views, one a piece.
    """

    layout: Layout
    device: torch.device
    """Where masters and gradients are, and so every Vector; of an offloading backend the host."""
    compute_dtype: torch.dtype
    """What the forward pass casts the weights to."""

    @property
    @abstractmethod
    def masters(self) -> Sequence[Tensor]: ...

    @property
    @abstractmethod
    def working(self) -> Sequence[Tensor]: ...

    @property
    @abstractmethod
    def separate_master(self) -> bool:
        """Whether `working` is a copy that can be rebuilt from `masters`."""

    @property
    def sole(self) -> bool:
        """Whether `working` is the only copy of the weights: one process, and nothing gathered from them."""
        return False

    @abstractmethod
    def drop_gathered(self) -> None:
        """Drop every gathered copy of the weights on this rank, so that an edit of `working` is seen. No collective."""

    @abstractmethod
    def refresh_gathered(self) -> None:
        """Make every gathered copy equal to `working` (collective)."""

    @abstractmethod
    def sum_pieces_(self, values: Tensor) -> Tensor:
        """Sum in place over the ranks that together hold the vector once (its shard group)."""

    @abstractmethod
    def dealing(self, parameters: Sequence[int], dtype: torch.dtype) -> Dealing:
        """These parameters (by number, in order) dealt whole, as `dtype`, over the ranks that share them.

        Collective to make.
        """

    @abstractmethod
    def base_state(self, key: str) -> Sequence[Tensor]:
        """The base's state `key` (say "momentum_buffer"), one 1-D view a piece; KeyError where there is none."""

    @abstractmethod
    def report_failure(self, error: BaseException) -> None:
        """Tell the other ranks that this one raised, and free those that wait for it in a collective."""

    @abstractmethod
    def repair(self) -> None:
        """Before the collective `resync`: make sure that a collective can run, and drop what a broken pass left."""
