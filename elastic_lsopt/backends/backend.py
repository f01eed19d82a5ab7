"""What all backends share: torch optimizers that step on slots, sums over groups, the report of a failure.

A backend knows where the pieces are and how the framework makes its copies right. It knows no rho and no learning rate.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from elastic_lsopt.backends.base_trial import refuse_closure
from elastic_lsopt.backends.dealt import Replicated, Sharded
from elastic_lsopt.backends.gathering import Gathering
from elastic_lsopt.backends.groups import Group, Groups, present
from elastic_lsopt.backends.transport import Transport
from elastic_lsopt.errors import Unsupported
from elastic_lsopt.oracle.gradient_engine import GradientEngine
from elastic_lsopt.space.dealing import Dealing
from elastic_lsopt.space.layout import Piece
from elastic_lsopt.space.vector import Vector
from elastic_lsopt.updates.update_optimizer import updates_of


class Backend(GradientEngine):
    """A framework's model and base optimizer. `name` is how messages call it."""

    name: str
    base: torch.optim.Optimizer | None
    transport: Transport
    max_grad_norm: float | None = None
    """The limit of the gradient's norm; 0 or None: none."""
    shard_group: dist.ProcessGroup | None = None
    """The ranks that together hold the vector once; None where every rank holds all of it."""

    @cached_property
    def groups(self) -> Groups:
        """The job and the replica that this process was in when the backend was made."""
        return present()

    @property
    def replica(self) -> int:
        return self.groups.number

    @property
    def replicas(self) -> int:
        return self.groups.replicas

    @cached_property
    def _shard(self) -> Group:
        return Group.of(self.shard_group)

    @property
    @abstractmethod
    def parameters(self) -> Mapping[str, Tensor]:
        """The trained parameters as the base optimizer was given them, by name."""

    @property
    @abstractmethod
    def slots(self) -> Sequence[Tensor]:
        """This rank's master tensors, as the framework shaped them (local, never a DTensor)."""

    @abstractmethod
    def step(self, gradient: Vector, norm: float | None) -> None:
        """Clip the gradient in the buffer and let the base optimizer step; leaves every copy of the weights right."""

    def refuse_base(self) -> None:
        """Raise UserError or Unsupported for a base optimizer that cannot step right on these pieces (collective)."""
        if self.base is not None and updates_of(self.base) is None:
            refuse_closure(self.base)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The base optimizer's groups: set a learning rate here."""
        return self.base.param_groups if self.base is not None else []

    def unreduced_gradients(self) -> Sequence[Tensor]:
        """Gradients that the framework has accumulated without reducing them, where it keeps such aside."""
        return []

    # -- halves ------------------------------------------------------------------------------------------------

    def form_halves(self) -> None:
        raise Unsupported(
            f"halves=True needs every rank to hold all weights, each half at a point of its own, and {self.name} does "
            "not do that; wrap the model in DistributedDataParallel (backend: replicated), or set halves=False."
        )

    def gradients_of_halves(self) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        raise NotImplementedError(self.name)

    # -- pieces ------------------------------------------------------------------------------------------------

    @property
    def masters(self) -> list[Tensor]:
        return self.views(self.slots)

    def views(self, slots: Sequence[Tensor]) -> list[Tensor]:
        """The pieces as 1-D views of tensors shaped like the slots."""
        return [slots[p.slot].view(-1)[p.start : p.start + p.length] for p in self.layout.pieces]

    def sum_pieces_(self, values: Tensor) -> Tensor:
        return self._sum_(self._shard, values)

    def sum_replica_(self, values: Tensor) -> Tensor:
        return self._sum_(self.groups.replica, values)

    def sum_job_(self, values: Tensor) -> Tensor:
        return self._sum_(self.groups.job, values)

    def _sum_(self, group: Group, values: Tensor) -> Tensor:
        self.transport.refuse_cut()
        if group.handle is None or values.device.type == self.compute_device.type:
            return group.sum_(values)
        # Offloaded values lie on the host, and NCCL talks only of what is on a GPU.
        return values.copy_(group.sum_(values.to(self.compute_device)))

    def left_alone(self, vector: Vector, without: Sequence[int]) -> frozenset[int]:
        """Of these slots, which no pass has given a gradient, those to which the vector gives none either.

        A base leaves a parameter without a gradient as it is; zeros would make it decay, and count as a step. One
        all-reduce of a number per slot, where there is any and weights are sharded.
        """
        if not without:
            return frozenset()
        number = {slot: i for i, slot in enumerate(without)}
        moved = torch.zeros(len(number), dtype=torch.float64, device=self.device)
        for piece, t in zip(self.layout.pieces, vector.tensors, strict=True):
            if piece.slot in number:
                moved[number[piece.slot]] += t.any()
        return frozenset(s for s, any_ in zip(without, self.sum_pieces_(moved).tolist(), strict=True) if not any_)

    def unmoved(self) -> frozenset[str]:
        """The names of parameters to which `install` gave no gradient either, alike on all ranks.

        None where the framework steps, and so decays, what nothing gave a gradient (DeepSpeed).
        """
        return frozenset(self.layout.parameters[slot].name for slot in self.without_gradient())

    # -- the base optimizer's state ----------------------------------------------------------------------------

    def state_of(self, piece: Piece) -> tuple[dict[str, Any], Tensor]:
        """The base optimizer's own state dict for a piece's slot, and the slot's key tensor."""
        key = self.slot_keys[piece.slot]
        return (self.base.state[key] if self.base is not None else {}), key

    def group_of(self, piece: Piece) -> dict[str, Any]:
        """The base optimizer's param group of a piece."""
        key = self.slot_keys[piece.slot]
        return next(group for group in self.param_groups if any(p is key for p in group["params"]))

    def base_state(self, key: str) -> list[Tensor]:
        out = []
        for piece in self.layout.pieces:
            value = local(self.state_of(piece)[0][key])
            out.append(value.view(-1)[piece.start : piece.start + piece.length])
        return out

    def base_states(self) -> Iterator[tuple[Piece, str, Any]]:
        """(piece, key, value) of all base state: a 1-D view where it is element by element, else the value itself."""
        slots = self.slots
        for piece in self.layout.pieces:
            state, _ = self.state_of(piece)
            size = slots[piece.slot].numel()
            for key, value in state.items():
                if isinstance(value, Tensor) and value.dim() and local(value).numel() == size:
                    yield piece, key, local(value).view(-1)[piece.start : piece.start + piece.length]
                else:
                    yield piece, key, value

    # -- whole parameters --------------------------------------------------------------------------------------

    @cached_property
    def _gathering(self) -> Gathering:
        return Gathering(self.layout, self.compute_device, self.shard_group, self.holders_group)

    @property
    def holders_group(self) -> dist.ProcessGroup | None:
        """The ranks that hold the same pieces as this one; None where there are none."""
        return self.groups.replica.handle if self.shard_group is None else None

    def all_gather(self, pieces: Sequence[Tensor], wanted: Sequence[int], dtype: torch.dtype) -> list[Tensor]:
        self.transport.refuse_cut()
        return [t.to(self.compute_device) for t in self._gathering.all_gather(pieces, wanted, dtype)]

    def reduce_scatter(
        self, wholes: Sequence[Tensor | None], wanted: Sequence[int], dtype: torch.dtype
    ) -> list[Tensor]:
        self.transport.refuse_cut()
        return [t.to(self.device) for t in self._gathering.reduce_scatter(wholes, wanted, dtype)]

    def dealing(self, parameters: Sequence[int], dtype: torch.dtype) -> Dealing:
        self.transport.refuse_cut()
        like = torch.empty(0, dtype=dtype, device=self.compute_device)
        if self._shard.handle is not None:
            return Sharded(self.layout, self._gathering.everyones, parameters, self._shard.handle, like)
        return Replicated(self.layout, parameters, self.holders_group, like)

    def sum_holders(self, pieces: Sequence[Tensor]) -> Sequence[Tensor]:
        self.transport.refuse_cut()
        summed = self._gathering.sum_holders([t.to(self.compute_device) for t in pieces])
        return [t.to(self.device) for t in summed]

    def own(self, wanted: Sequence[int]) -> list[int]:
        return self._gathering.own(wanted)

    def plain_class(self, module: nn.Module) -> type[nn.Module]:
        return type(module)

    def full_shape(self, parameter: Tensor) -> tuple[int, ...]:
        return tuple(parameter.shape)

    def part_of(self, parameter: Tensor) -> tuple[int, Tensor]:
        """What this rank holds of a parameter of the module, trained or frozen: (offset, a 1-D view of its memory)."""
        return 0, parameter.detach().view(-1)

    def full_parameter(self, parameter: Tensor) -> Tensor:
        whole = getattr(parameter, "full_tensor", None)
        return whole() if whole is not None else parameter

    # -- failures ----------------------------------------------------------------------------------------------

    def report_failure(self, error: BaseException) -> None:
        self.transport.report(error)

    def repair(self) -> None:
        self.transport.repair()


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor; the tensor itself otherwise."""
    return getattr(tensor, "_local_tensor", tensor)


def scale_to_norm_(tensors: list[Tensor], norm: float, max_norm: float) -> None:
    """Clip as `torch.nn.utils.clip_grad_norm_` does, given the global norm: one multiplication, no communication."""
    factor = max_norm / (norm + 1e-6)
    if factor < 1.0 and tensors:
        torch._foreach_mul_(tensors, factor)
