"""How a backend brings pieces together to whole parameters, and sums of whole tensors back into pieces.

What multiplies curvature with vectors needs it, and nothing else does.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class WholeParameters(ABC):
    """`all_gather` and `reduce_scatter` are each other's transpose."""

    @abstractmethod
    def all_gather(self, pieces: Sequence[Tensor], wanted: Sequence[int], dtype: torch.dtype) -> list[Tensor]:
        """Each wanted parameter in full, from this rank's 1-D pieces of them (collective); may be views of them."""

    @abstractmethod
    def reduce_scatter(
        self, wholes: Sequence[Tensor | None], wanted: Sequence[int], dtype: torch.dtype
    ) -> list[Tensor]:
        """This rank's 1-D pieces of the sum of `wholes` over its shard group (collective); None stands for zeros."""

    @abstractmethod
    def sum_holders(self, pieces: Sequence[Tensor]) -> Sequence[Tensor]:
        """The pieces' sums over the ranks that hold the same ones (collective)."""

    @abstractmethod
    def own(self, wanted: Sequence[int]) -> list[int]:
        """The places, in `layout.pieces`, of this rank's pieces of these parameters."""

    @abstractmethod
    def plain_class(self, module: nn.Module) -> type[nn.Module]:
        """The user's own class of a module that the framework may have given another."""

    @abstractmethod
    def full_shape(self, parameter: Tensor) -> tuple[int, ...]:
        """The shape of a module's parameter when it is whole."""

    @abstractmethod
    def full_parameter(self, parameter: Tensor) -> Tensor:
        """A module's parameter that is not trained, whole on this rank (collective where it is sharded)."""
