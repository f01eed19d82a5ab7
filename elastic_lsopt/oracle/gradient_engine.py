"""What the oracle needs of a backend, beyond the place of the pieces: forward, backward, the gradient's buffer."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from elastic_lsopt.space.layout import Shards
from elastic_lsopt.space.vector import Vector


class GradientEngine(Shards):
    """The backend as the oracle sees it."""

    module: nn.Module | None
    """The user's own module, for checks (None where only its parameters are known)."""
    rank: int
    world: int
    replicas: int
    """How many ranks hold each piece: the sum of local squares over the world counts it so often."""
    observed: bool = False
    """A forward has told in what type it computes (`compute_type.py`)."""

    outermost: Sequence[nn.Module] = ()
    """The modules around `module` whose forwards a pass may run too; none: there is only that one."""

    @property
    def roots(self) -> Sequence[nn.Module]:
        """The modules whose forwards a pass runs, with all that is in them."""
        return self.outermost or ([self.module] if self.module is not None else [])

    @property
    @abstractmethod
    def slot_keys(self) -> Sequence[Tensor]:
        """The tensors under which the base optimizer keeps its state, one a slot."""

    @property
    @abstractmethod
    def forward(self) -> Any:
        """What is called in place of the module, so that the framework's hooks run."""

    @abstractmethod
    def begin(self, *, last: bool) -> None:
        """Before a micro-batch's forward: `last` says that its backward closes the accumulation."""

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Add the gradient of `loss`, averaged over the world, to the buffer."""

    @abstractmethod
    def clear_gradient(self) -> None:
        """Empty the buffer: the next backward starts a new sum."""

    @abstractmethod
    def gradients(self) -> Sequence[Tensor]:
        """The buffer after the last backward, one 1-D tensor a piece (zeros for a parameter that took no part)."""

    @abstractmethod
    def install(self, vector: Vector) -> None:
        """Make `vector` the gradient that the base optimizer will step with."""

    # -- whole parameters, for products with the curvature ---------------------------------------------------------

    @abstractmethod
    def all_gather(self, pieces: Sequence[Tensor], wanted: Sequence[int], dtype: torch.dtype) -> list[Tensor]:
        """Each wanted parameter in full, from this rank's 1-D pieces of them (collective); may be views of them."""

    @abstractmethod
    def reduce_scatter(
        self, wholes: Sequence[Tensor | None], wanted: Sequence[int], dtype: torch.dtype
    ) -> list[Tensor]:
        """This rank's 1-D pieces of the sum of `wholes` over its shard group (collective); None stands for zeros."""

    @abstractmethod
    def sum_replicas(self, pieces: Sequence[Tensor]) -> Sequence[Tensor]:
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

    @abstractmethod
    def sum_world_(self, values: Tensor) -> Tensor:
        """Sum in place over all ranks of the job (fp64, on `device`)."""
