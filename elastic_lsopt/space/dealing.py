"""Whole parameters dealt out over the ranks: each comes together on one of them, is worked on there, and goes back.

    deal = shards.dealing(parameters)         who gets which: the dearest first, to the rank that has least to do
    wholes = deal.gather(pieces)              {parameter: whole tensor} of those that this rank got
    pieces = deal.scatter(wholes)             this rank's own pieces of what all have made

One all-to-all each way, or one all-gather on the way back where every rank holds all pieces.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

from torch import Tensor


class Dealing(ABC):
    """The way of some parameters to their ranks and back; both ways are collective over the ranks that share them."""

    mine: tuple[int, ...]
    """The numbers of the parameters that this rank gets."""

    @abstractmethod
    def gather(self, pieces: Sequence[Tensor]) -> dict[int, Tensor]:
        """The parameters in `mine`, whole, from every rank's 1-D `pieces` of all that are dealt (in layout's order)."""

    @abstractmethod
    def scatter(self, wholes: Mapping[int, Tensor]) -> list[Tensor]:
        """This rank's 1-D pieces of all that are dealt, from every rank's `wholes` of its own, and where those are."""


def deal(costs: Sequence[float], ranks: int) -> list[int]:
    """The rank that gets each item: the dearest first, each to the rank that has least to do so far."""
    load, out = [0.0] * ranks, [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        out[i] = min(range(ranks), key=lambda r: (load[r], r))
        load[out[i]] += costs[i]
    return out
