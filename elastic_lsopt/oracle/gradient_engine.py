"""What the oracle needs of a backend, beyond the place of the pieces: forward, backward, the gradient's buffer."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from elastic_lsopt.oracle.whole_parameters import WholeParameters
from elastic_lsopt.space.layout import Shards
from elastic_lsopt.space.vector import Vector


class GradientEngine(Shards, WholeParameters):
    """The backend as the oracle sees it: shards, whole parameters, and the passes that fill a gradient buffer."""

    module: nn.Module | None
    """The user's own module, for checks (None where only its parameters are known)."""
    rank: int
    world: int
    """This rank's number and the number of ranks in its replica: those that train one copy of the model in step."""
    holders: int
    """How many ranks hold each piece: the sum of local squares over the world counts it so often."""
    half: int | None = None
    """In which half of the ranks this one is, 0 or 1, once `form_halves` has parted them."""
    still: bool = False
    """The forward was looked at, and moves no buffer."""
    observed: bool = False
    """A forward has told in what type it computes (`compute_type.py`)."""

    outermost: Sequence[nn.Module] = ()
    """The modules around `module` whose forwards a pass may run too; none: there is only that one."""

    @property
    def compute_device(self) -> torch.device:
        """Where forwards run, and through which ranks talk; another than `device` where the weights are offloaded."""
        return self.device

    @property
    def replica(self) -> int:
        """This replica's number."""
        return 0

    @property
    def replicas(self) -> int:
        """The number of replicas in the job."""
        return 1

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
        """Add the gradient of `loss`, averaged over the replica, to the buffer."""

    @abstractmethod
    def clear_gradient(self) -> None:
        """Empty the buffer: the next backward starts a new sum."""

    @abstractmethod
    def gradients(self) -> Sequence[Tensor]:
        """The buffer after the last backward, one 1-D tensor a piece (zeros for a parameter that took no part)."""

    def without_gradient(self) -> frozenset[int]:
        """The slots to which the passes since `clear_gradient` gave none, alike on all ranks.

        Empty where a framework makes them zeros, as DeepSpeed does.
        """
        return frozenset()

    def used(self) -> int:
        """A checksum of what each micro-batch since `clear_gradient` gave a gradient to, in its order.

        0 where the sums over the ranks are right whatever a rank has used, and when. Where a framework sums what
        the ranks have, one after the other, it would add the gradient of one parameter to that of another.
        """
        return 0

    @abstractmethod
    def install(self, vector: Vector) -> None:
        """Make `vector` the gradient that the base optimizer will step with."""

    @abstractmethod
    def form_halves(self) -> None:
        """Part the ranks into two halves that may stand at different points (collective; once).

        Raises Unsupported where a rank does not hold all weights, and for an odd number of ranks.
        """

    @abstractmethod
    def gradients_of_halves(self) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """The gradient of each half, after passes that none of them has closed (`begin(last=False)`; collective).

        As `gradients`, whose buffer holds the second half's from then on.
        """

    @abstractmethod
    def sum_replica_(self, values: Tensor) -> Tensor:
        """Sum in place over the ranks of the replica (fp64)."""

    @abstractmethod
    def sum_job_(self, values: Tensor) -> Tensor:
        """Sum in place over all ranks of the job (fp64)."""
