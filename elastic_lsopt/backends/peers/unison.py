"""The ranks of a replica fail together: where one has lost a peer, all of them raise at the same point.

[Note: between peers and within] A rank may lose its peer while its neighbour's is well. If it alone left the exchange,
the neighbour would wait for it in the next collective of the replica. So each word between peers ends with one within
the replica, in which its ranks say whether they have heard it; numbers to be summed ride on it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from elastic_lsopt.backends.groups import Group
from elastic_lsopt.errors import PeerFailed

T = TypeVar("T")


class Unison:
    """`inside` are the replica's ranks, in a group that nothing else uses meanwhile."""

    def __init__(self, inside: Group) -> None:
        self._inside = inside

    def __call__(self, act: Callable[[], T]) -> T:
        """`act()` on all ranks (collective). Raises PeerFailed on all where it did on one."""
        result, _ = self.summed(lambda: (act(), None))
        return result

    def summed(self, act: Callable[[], tuple[T, Tensor | None]], shape: tuple[int, ...] = (0,)) -> tuple[T, Tensor]:
        """The same of an `act` that gives numbers of this shape too (None: zeros), and their sum over the ranks."""
        told = torch.zeros(1 + torch.Size(shape).numel(), dtype=torch.float64)
        result: T | None = None
        error: PeerFailed | None = None
        try:
            result, own = act()
            if own is not None:
                told[1:] = own.reshape(-1)
        except PeerFailed as failed:
            error, told[0] = failed, 1.0
        self._inside.sum_(told)
        if told[0]:
            raise error or PeerFailed("another rank of this replica has lost a peer")
        return result, told[1:].view(shape)  # type: ignore[return-value]
