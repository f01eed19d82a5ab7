"""Parameters in DTensor shards: `fully_shard` on one mesh dimension, or two (HSDP: replicate x shard).

FSDP2 gathers a group's weights from the shards that it registered, and keeps the gathered copy in three states: after
a forward without backward (the root), with `reshard_after_forward=False`, and with `set_reshard_after_backward(False)`.
A shard edited meanwhile is silently ignored. So `drop_gathered` reshards every FSDP module around each edit, and shards
are written in place (a rebound `.data` is ignored too).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any
from zlib import crc32

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._composable_state import _module_state_mapping  # private; see _registered_modules
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from elastic_lsopt.backends.backend import Backend, local, scale_to_norm_
from elastic_lsopt.backends.base_trial import reason_against_rows
from elastic_lsopt.backends.group_order import GroupOrder
from elastic_lsopt.backends.trainable import trainable
from elastic_lsopt.backends.transport import Transport
from elastic_lsopt.errors import Unsupported
from elastic_lsopt.space.layout import Layout, Parameter, Piece
from elastic_lsopt.space.vector import Vector
from elastic_lsopt.updates.update_optimizer import updates_of


class FSDP2(Backend):
    """A model under `fully_shard`; the slots are the local shards of its trainable DTensors.

    `named_parameters` are those to train; `model` is the root FSDP module, None for a user's own closure (the FSDP
    modules are then found through torch's registry). Raises Unsupported for shards along another dimension than 0,
    parameters that FSDP does not manage, and meshes that are not (shard) or (replicate, shard). Under CPUOffloadPolicy
    shards, gradients and the base's state are on the host, and so is every Vector.
    """

    name = "fsdp2"
    separate_master = False  # type: ignore[assignment]

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        base: torch.optim.Optimizer | None,
        *,
        model: nn.Module | None = None,
        max_grad_norm: float | None = None,
    ) -> None:
        self.base, self.max_grad_norm = base, max_grad_norm
        self.module = model
        self._modules = _fsdp_modules(model)
        for module in self._modules:
            module.reshard()  # a gathered group hides its DTensors from `parameters()`
        named = trainable(model.named_parameters() if model is not None else named_parameters)
        if model is None:
            ours = {id(p) for _, p in named}
            self._modules = [m for m in self._modules if any(id(p) in ours for p in _parameters(m))]
        for name, p in named:
            _refuse(name, p)
        self._parameters: list[DTensor] = [p for _, p in named]  # type: ignore[misc]
        self._used, self._versions = 0, [0] * len(self._parameters)
        self._order = GroupOrder(self._modules)
        mesh = self._parameters[0].device_mesh
        self.transport = Transport()
        self.rank, self.world = self.transport.rank, self.transport.world
        if mesh.size() != self.world:
            raise Unsupported(
                f"the FSDP mesh has {mesh.size()} ranks, the job {self.world}: tensor and pipeline parallel meshes are "
                "not supported; use a mesh of all ranks, (shard) or (replicate, shard)."
            )
        self.shard_group = mesh.get_group(mesh.ndim - 1)
        self.holders = self.world // dist.get_world_size(self.shard_group)
        self._holders_group = mesh.get_group(0) if mesh.ndim == 2 else None
        self.device = local(self._parameters[0]).device
        self._compute_device = _compute_device(mesh)
        self.compute_dtype = self._compute_dtype()
        pieces = []
        for i, p in enumerate(self._parameters):
            offset, part = self.part_of(p)
            if n := part.numel():
                pieces.append(Piece(i, offset, n, i, 0))
        self.layout = Layout(tuple(Parameter(n, tuple(p.shape)) for n, p in named), tuple(pieces))

    def _compute_dtype(self) -> torch.dtype:
        policies = [m._get_fsdp_state()._mp_policy.param_dtype for m in self._modules]  # private: torch 2.11 to 2.13
        return next((d for d in policies if d is not None), self._parameters[0].dtype)

    @property
    def compute_device(self) -> torch.device:
        return self._compute_device

    def refuse_base(self) -> None:
        super().refuse_base()
        if self.base is None or updates_of(self.base) is not None:
            return
        first = self._parameters[0]

        def cut(whole: Tensor) -> Tensor:
            placements = first.placements if whole.dim() else [Replicate()] * first.device_mesh.ndim
            return distribute_tensor(whole, first.device_mesh, placements, src_data_rank=None)

        shards = self.world // self.holders
        if reason := reason_against_rows(self.base, shards, self.device, cut, local, self.sum_replica_):
            raise Unsupported(
                f"base {type(self.base).__name__} needs whole parameters and FSDP2 gives it sharded rows: {reason}; "
                "let it compute with the DTensors themselves (p.norm(), never p.to_local().norm()), or use one that "
                "works element by element (SGD, Adam, AdamW …), or DDP."
            )

    @property
    def holders_group(self) -> dist.ProcessGroup | None:
        return self._holders_group

    def plain_class(self, module: nn.Module) -> type[nn.Module]:
        """`fully_shard` gives a module a class of its own, made of FSDPModule and the user's."""
        kind = type(module)
        return next(c for c in kind.__mro__[1:] if c is not FSDPModule) if isinstance(module, FSDPModule) else kind

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        return {p.name: own for p, own in zip(self.layout.parameters, self._parameters, strict=True)}

    def part_of(self, parameter: Tensor) -> tuple[int, Tensor]:
        if not isinstance(parameter, DTensor):
            return super().part_of(parameter)
        _, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
        row = Parameter("", tuple(parameter.shape[1:])).numel
        return offset[0] * row, local(parameter).detach().view(-1)

    @property
    def slots(self) -> list[Tensor]:
        return [local(p).detach() for p in self._parameters]

    @property
    def slot_keys(self) -> Sequence[Tensor]:
        return self._parameters

    @property
    def working(self) -> list[Tensor]:
        return self.masters

    def drop_gathered(self) -> None:
        for module in self._modules:
            module.reshard()

    def refresh_gathered(self) -> None:
        """The next forward gathers from the shards."""

    def repair(self) -> None:
        super().repair()
        for module in self._modules:
            if module._get_fsdp_state()._is_root:
                _forget_pass(module)

    @property
    def forward(self) -> Any:
        return self.module

    def begin(self, *, last: bool) -> None:
        self.transport.refuse_cut()

    def backward(self, loss: Tensor) -> None:
        # Every micro-batch reduces into the shards at once: no rank ever holds a whole gradient.
        loss.backward()
        self._note_used()

    def used(self) -> int:
        self._note_used()  # of a closure, whose backwards are its own
        return self._used

    def _note_used(self) -> None:
        """FSDP2 reduces what this rank has a gradient for, and nothing else: it makes that one, or adds to it."""
        now = [0 if p.grad is None else 1 + local(p.grad)._version for p in self._parameters]
        if now != self._versions:
            changed = bytes(new != old for new, old in zip(now, self._versions, strict=True))
            self._used, self._versions = crc32(changed, self._used), now
        self._used = crc32(self._order.taken(), self._used)

    def clear_gradient(self) -> None:
        self._used, self._versions = 0, [0] * len(self._parameters)
        self._order.taken()
        for p in self._parameters:
            p.grad = None
        for unsharded in self._fsdp_parameters():
            unsharded.unsharded_accumulated_grad = None
            if hasattr(unsharded, "_unsharded_param"):
                unsharded._unsharded_param.grad = None

    def unreduced_gradients(self) -> list[Tensor]:
        """What backward passes under `set_requires_gradient_sync(False)` have left in the gathered parameters."""
        found = []
        for p in self._fsdp_parameters():
            gathered = getattr(p, "_unsharded_param", None)
            found += [p.unsharded_accumulated_grad, gathered.grad if gathered is not None else None]
        return [local(g) for g in found if g is not None]

    def _fsdp_parameters(self) -> Iterator[Any]:
        for module in self._modules:
            group = module._get_fsdp_state()._fsdp_param_group  # private: torch 2.11 to 2.13
            yield from group.fsdp_params if group is not None else ()

    def gradients(self) -> list[Tensor]:
        grads = [None if p.grad is None else local(p.grad) for p in self._parameters]
        return [
            torch.zeros(piece.length, dtype=self._parameters[piece.slot].dtype, device=self.device)
            if (g := grads[piece.slot]) is None
            else g.view(-1)
            for piece in self.layout.pieces
        ]

    def without_gradient(self) -> frozenset[int]:
        return frozenset(i for i, p in enumerate(self._parameters) if p.grad is None)

    def install(self, vector: Vector) -> None:
        alone = self.left_alone(vector, sorted(self.without_gradient()))
        for i, p in enumerate(self._parameters):
            if p.grad is None and i not in alone:
                p.grad = torch.zeros_like(p)
        for piece, t in zip(self.layout.pieces, vector.tensors, strict=True):
            if piece.slot not in alone:
                local(self._parameters[piece.slot].grad).view(-1).copy_(t)  # type: ignore[arg-type]

    def step(self, gradient: Vector, norm: float | None) -> None:
        assert self.base is not None
        if self.max_grad_norm and norm is not None:
            scale_to_norm_([local(p.grad) for p in self._parameters if p.grad is not None], norm, self.max_grad_norm)
        self.base.step()


def _fsdp_modules(model: nn.Module | None) -> list[FSDPModule]:
    """The FSDP modules of the model, or every one of the process (torch keeps a weak registry of them)."""
    modules = model.modules() if model is not None else list(_module_state_mapping)
    return [m for m in modules if isinstance(m, FSDPModule)]


def _parameters(module: FSDPModule) -> Iterable[nn.Parameter]:
    assert isinstance(module, nn.Module)
    return module.parameters()


def _forget_pass(root: FSDPModule) -> None:
    """Let go of the gathers, reductions and marks that a pass leaves behind when an exception ends it."""
    if hasattr(root, "reset_iter_state"):
        root.reset_iter_state()
        return
    from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState

    # torch 2.11 keeps the same state and has no function for it: what each step of a pass sets, in its order.
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    state: Any = root._get_fsdp_state()
    state._comm_ctx.all_gather_state = state._comm_ctx.reduce_scatter_state = None
    state._comm_ctx.post_forward_order.clear()
    for each in state._state_ctx.all_states:
        each._modules_to_run_forward.clear()
        each._training_state = TrainingState.IDLE
        if (group := each._fsdp_param_group) is not None:
            if group._all_gather_result is not None and group._all_gather_result.all_gather_work is not None:
                group._all_gather_result.all_gather_work.wait()
            group._all_gather_result = group._post_reduce_event = group._all_reduce_state = None
            group._reshard_after_forward_event = group._partial_reduce_output = None
            group._post_forward_indices.clear()
            group._training_state = TrainingState.IDLE
            group._to_sharded()
    state._state_ctx.iter_forward_root = None
    state._state_ctx.post_backward_final_callback_queued = False


def _refuse(name: str, p: nn.Parameter) -> None:
    if not isinstance(p, DTensor):
        raise Unsupported(
            f"parameter {name} is a {type(p).__name__}, not a DTensor: wrap the whole model with fully_shard "
            "(ignored parameters are not supported)."
        )
    if p.device_mesh.ndim > 2 or not isinstance(p.placements[-1], Shard) or p.placements[-1].dim != 0:
        raise Unsupported(
            f"parameter {name} is placed as {p.placements}: supported are (Shard(0)) and (Replicate, Shard(0))."
        )
    if p.device_mesh.ndim == 2 and not isinstance(p.placements[0], Replicate):
        raise Unsupported(
            f"parameter {name} is placed as {p.placements}: supported is (Replicate, Shard(0)) on two dimensions."
        )


def _compute_device(mesh: DeviceMesh) -> torch.device:
    """This rank's device of the mesh: `fully_shard` gathers there, whatever policy keeps the shards elsewhere."""
    if mesh.device_type == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device(mesh.device_type)
