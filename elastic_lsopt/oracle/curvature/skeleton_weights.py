"""The weights of a skeleton as leaves of autograd: all of them gathered, or block after block.

    Gathered     leaves are whole parameters. Nothing is exchanged while a graph is built or used.
    Blockwise    leaves are this rank's pieces. Each block gathers its weights when it runs, and lets go of them after
                 (`blockwise.py`).

Both turn a sharded vector into one that is shaped like the leaves (`spread`), and what autograd gives for the leaves,
each rank's share, into a sharded vector of the sum over all ranks (`collect`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from elastic_lsopt.oracle.curvature.skeleton import Skeleton
from elastic_lsopt.space.geometry import ParameterSpace
from elastic_lsopt.space.vector import Vector


class Weights(ABC):
    """A skeleton's weights at the point where the space is when this is made (collective).

    `leaves` are what to differentiate by, `model` what to call; `twice`: they will be differentiated twice.
    """

    @property
    @abstractmethod
    def communicates(self) -> bool:
        """Whether a forward is collective, so that every rank must run as many."""

    def __init__(self, space: ParameterSpace, skeleton: Skeleton, *, twice: bool) -> None:
        self.space, self.skeleton, self._twice = space, skeleton, twice
        self.dtype = skeleton.dtype
        self.backend = skeleton.backend
        self.leaves: list[Tensor] = []

    @property
    def model(self) -> Any:
        return self.skeleton.module

    def attention(self) -> Any:
        """Inside, scaled dot product attention takes that implementation which can be differentiated twice."""
        return sdpa_kernel(SDPBackend.MATH) if self._twice else nullcontext()

    def pieces(self) -> list[Tensor]:
        """This rank's weights in the skeleton's precision: the masters; inside a perturbation what the forward sees."""
        shards = self.space.shards
        held = shards.working if self.space.copies.perturbations else shards.masters
        return [t.detach().to(self.dtype) for t in held]

    @abstractmethod
    def spread(self, v: Vector) -> list[Tensor]:
        """The vector, shaped like the leaves."""

    @abstractmethod
    def collect(self, parts: Sequence[Tensor | None]) -> Vector:
        """A vector of its own memory: the sum over all ranks of what autograd gave for the leaves."""

    @contextmanager
    def moved(self, direction: Vector, scale: float) -> Iterator[None]:
        """Inside, the leaves are others, at w + scale * direction. Memory: the leaves once more."""
        here = self.leaves
        with torch.no_grad():
            there = [t + scale * d for t, d in zip(here, self.spread(direction), strict=True)]
        self._stand_at([t.requires_grad_() for t in there])
        try:
            yield
        finally:
            self._stand_at(here)

    def _stand_at(self, leaves: list[Tensor]) -> None:
        self.leaves = leaves

    @abstractmethod
    def close(self) -> None:
        """Let go of the weights."""


class Gathered(Weights):
    """All weights whole on each rank. Memory: the model in the space's precision (none where the ranks hold it)."""

    @property
    def communicates(self) -> bool:
        return False

    def __init__(self, space: ParameterSpace, skeleton: Skeleton, *, twice: bool) -> None:
        super().__init__(space, skeleton, twice=twice)
        self._all = tuple(range(skeleton.trainable))
        own = self.backend.all_gather(self.pieces(), self._all, self.dtype)
        self._frozen = skeleton.whole_frozen(range(skeleton.trainable, skeleton.trainable + len(skeleton.frozen)))
        self._stand_at([t.detach().requires_grad_() for t in own])

    def _stand_at(self, leaves: list[Tensor]) -> None:
        super()._stand_at(leaves)
        self.skeleton.fill(self.skeleton.places, [*leaves, *self._frozen])

    def spread(self, v: Vector) -> list[Tensor]:
        return self.backend.all_gather([t.to(self.dtype) for t in v.tensors], self._all, self.dtype)

    def collect(self, parts: Sequence[Tensor | None]) -> Vector:
        out = self.space.empty()
        with torch.no_grad():
            mine = self.backend.sum_holders(self.backend.reduce_scatter(parts, self._all, self.dtype))
            torch._foreach_copy_(out.tensors, list(mine))
        return out

    def close(self) -> None:
        self.skeleton.clear(self.skeleton.places)
        self.leaves, self._frozen = [], []
