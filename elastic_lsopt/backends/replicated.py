"""Every rank holds all parameters: a plain module on one process, or DistributedDataParallel."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from elastic_lsopt.backends.backend import Backend, scale_to_norm_
from elastic_lsopt.backends.halves import Halves
from elastic_lsopt.backends.trainable import trainable
from elastic_lsopt.backends.transport import Transport
from elastic_lsopt.errors import Unsupported
from elastic_lsopt.space.layout import Layout, Parameter, Piece
from elastic_lsopt.space.vector import Vector


class Replicated(Backend):
    """Parameters whole on each rank; the slots are the parameters themselves.

    `named_parameters` are those to train (names may be made up by the caller); `model` is the module or its DDP
    wrapper, None for a user's own closure. Raises Unsupported for several ranks without DDP (nothing would average
    their gradients), UserError where nothing is trainable.
    """

    name = "replicated"
    separate_master = False  # type: ignore[assignment]

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        base: torch.optim.Optimizer | None,
        *,
        model: nn.Module | None = None,
        max_grad_norm: float | None = None,
    ) -> None:
        named = trainable(named_parameters)
        self._parameters = [p for _, p in named]
        self.base, self.max_grad_norm = base, max_grad_norm
        self._wrapper = model
        self._ddp = model if isinstance(model, DistributedDataParallel) else None
        self.module = self._ddp.module if self._ddp else model
        self._learns_graph = self._ddp is not None and self._ddp.static_graph
        self._halves: Halves | None = None
        self.transport = Transport()
        self.rank, self.world = self.transport.rank, self.transport.world
        if model is not None and self._ddp is None and self.world > 1:
            raise Unsupported(
                f"a plain module on {self.world} ranks: nothing averages its gradients; wrap it in "
                "DistributedDataParallel or fully_shard, or use DeepSpeed."
            )
        self.holders = self.world
        self.device = self._parameters[0].device
        self.compute_dtype = self._parameters[0].dtype
        self.layout = Layout(
            tuple(Parameter(n, tuple(p.shape)) for n, p in named),
            tuple(Piece(i, 0, p.numel(), i, 0) for i, p in enumerate(self._parameters)),
        )
        for name, p in named:
            refuse_strided(name, p)

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        return {p.name: own for p, own in zip(self.layout.parameters, self._parameters, strict=True)}

    @property
    def slots(self) -> list[Tensor]:
        for i, p in enumerate(self._parameters):
            if not p.is_contiguous():  # a call of `to` since the last look
                refuse_strided(self.layout.parameters[i].name, p)
        return [p.detach() for p in self._parameters]

    @property
    def slot_keys(self) -> Sequence[Tensor]:
        return self._parameters

    @property
    def working(self) -> list[Tensor]:
        return self.masters

    @property
    def sole(self) -> bool:
        return self.groups.job.size == 1

    def drop_gathered(self) -> None:
        """There are no gathered copies."""

    def refresh_gathered(self) -> None:
        """There are no gathered copies."""

    @property
    def forward(self) -> Any:
        return self._wrapper

    def begin(self, *, last: bool) -> None:
        self.transport.refuse_cut()
        if self._ddp is not None:
            # Read by DDP's forward (it is what no_sync sets): only the closing backward averages the local sums. So
            # does the first of all under static_graph, which fails unless it averages; the sum of means is the same.
            self._ddp.require_backward_grad_sync = last or self._learns_graph

    def backward(self, loss: Tensor) -> None:
        loss.backward()
        self._learns_graph = False

    def clear_gradient(self) -> None:
        for p in self._parameters:
            p.grad = None

    def gradients(self) -> list[Tensor]:
        for i, p in enumerate(self._parameters):
            if p.grad is not None and (p.grad.is_sparse or not p.grad.is_contiguous()):
                refuse_strided(self.layout.parameters[i].name, p.grad)
        return [(torch.zeros_like(p) if p.grad is None else p.grad).view(-1) for p in self._parameters]

    def form_halves(self) -> None:
        if self._halves is not None:
            return
        if self._ddp is not None and self._ddp.static_graph:
            raise Unsupported(
                "halves=True: DistributedDataParallel(static_graph=True) averages its first backward pass over all "
                "ranks, which stand at two points; leave static_graph out, or set halves=False."
            )
        self._halves = Halves(self.groups.replica)
        self.half = self._halves.number
        self.transport.learn_ports()  # of the halves' own groups

    def gradients_of_halves(self) -> tuple[list[Tensor], list[Tensor]]:
        assert self._halves is not None
        self.transport.refuse_cut()
        first, second, taken = self._halves.reduced(self._parameters)
        for p, t, any_ in zip(self._parameters, second, taken, strict=True):
            if any_:  # by this rank or another: the base of each must see the same ones
                p.grad = t.view(p.shape).to(p.dtype)
        return first, self.gradients()

    def without_gradient(self) -> frozenset[int]:
        return frozenset(i for i, p in enumerate(self._parameters) if p.grad is None)

    def install(self, vector: Vector) -> None:
        alone = self.left_alone(vector, sorted(self.without_gradient()))
        for i, (p, t) in enumerate(zip(self._parameters, vector.tensors, strict=True)):
            if i not in alone:
                if p.grad is None:
                    p.grad = torch.empty_like(p)
                p.grad.view(-1).copy_(t)

    def step(self, gradient: Vector, norm: float | None) -> None:
        assert self.base is not None
        if self.max_grad_norm and norm is not None:
            scale_to_norm_([p.grad for p in self._parameters if p.grad is not None], norm, self.max_grad_norm)
        self.base.step()


def refuse_strided(name: str, t: Tensor) -> None:
    """Raise Unsupported for a parameter, or the gradient of one, that cannot be seen as one row of numbers."""
    if t.is_sparse:
        raise Unsupported(
            f"parameter {name} has a sparse gradient, which is no part of one vector; build the embedding with "
            "sparse=False."
        )
    if t.is_contiguous():
        return
    fix = (
        "call model.to(memory_format=torch.contiguous_format) before it is trained, and leave channels_last to the "
        "inputs."
        if t.dim() in (4, 5)  # torch gives a memory format to nothing else
        else "build the module with torch.nn.Parameter(p.detach().contiguous()) in its place."
    )
    raise Unsupported(f"parameter {name} is not contiguous (strides {tuple(t.stride())}); {fix}")
