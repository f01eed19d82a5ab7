"""Weights that are gathered one block at a time, for gradients and products with the curvature.

[Note: differentiated twice, one block at a time] `torch.utils.checkpoint` keeps a block's weights out of the first
backward's memory only: with create_graph the formulas of that backward save them once more, for the second (measured:
all weights were held). So a block is a function whose derivative is again such a function, and neither saves a weight:

    Block          x, pieces            -> y                  runs the block
    BlockGradient  x, pieces, dL/dy     -> dL/dx, dL/dpieces  runs it again, and back
    its derivative                                            runs it again, back, and back through that

A product through a graph of these costs 12 forwards (4 gradients): 9 in BlockGradient's derivative, 3 in Block's.

[Note: every rank the same way back] Each step of a backward pass here is a collective, so all ranks must take the same
steps in the same order. Autograd takes only those that lead from an output to a leaf, and that depends on the rank: it
may hold no piece of a block, and an idle micro-batch's loss is cut off before a criterion that the others differentiate
twice. So every block also takes a leaf that all ranks have (a zero), and gives out a token (a zero) on which its
gradient depends: a block that has run is always on the way back, in the first pass and in the second.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_flatten, tree_unflatten

from elastic_lsopt.oracle.curvature.skeleton import Block, Skeleton
from elastic_lsopt.oracle.curvature.skeleton_weights import Weights
from elastic_lsopt.space.geometry import ParameterSpace
from elastic_lsopt.space.vector import Vector


class Blockwise(Weights):
    """One block's weights at a time; see [Note: differentiated twice, one block at a time].

    Memory: a copy of this rank's pieces where they are narrower than the space's precision, one block, the activations
    between blocks, and what the root owns without a module of its own.

    The last leaf is the zero of [Note: every rank the same way back].
    """

    @property
    def communicates(self) -> bool:
        return self.backend.holders < self.backend.world

    def __init__(self, space: ParameterSpace, skeleton: Skeleton, *, twice: bool) -> None:
        super().__init__(space, skeleton, twice=twice)
        zero = torch.zeros((), dtype=self.dtype, device=space.shards.device)
        self.leaves = [t.requires_grad_() for t in (*self.pieces(), zero)]
        blocks, rest = skeleton.blocks()
        self._runners = [Runner(self, block) for block in blocks]
        self._rest = Share(self, rest)

    @property
    def model(self) -> Any:
        self._rest.fill()
        return self.skeleton.module

    def spread(self, v: Vector) -> list[Tensor]:
        return [*(t.to(self.dtype) for t in v.tensors), torch.zeros_like(self.leaves[-1])]

    def collect(self, parts: Sequence[Tensor | None]) -> Vector:
        mine = [
            torch.zeros_like(leaf) if t is None else t for t, leaf in zip(parts[:-1], self.leaves[:-1], strict=True)
        ]
        out = self.space.empty()
        with torch.no_grad():
            torch._foreach_copy_(out.tensors, list(self.backend.sum_holders(mine)))
        return out

    def close(self) -> None:
        for runner in self._runners:
            runner.close()
        self.skeleton.clear(self.skeleton.places)
        self.leaves = []


class Share:
    """The weights of a block, and this rank's pieces of them."""

    def __init__(self, weights: Blockwise, block: Block) -> None:
        self.weights, self.block = weights, block
        self.skeleton, self.backend = weights.skeleton, weights.skeleton.backend
        self.trainable, self.frozen = block.sources(self.skeleton.trainable)
        self._own = self.backend.own(self.trainable)
        self._dtype = weights.dtype

    @property
    def zero(self) -> Tensor:
        """The last leaf."""
        return self.weights.leaves[-1]

    @property
    def pieces(self) -> list[Tensor]:
        """This rank's leaves in the block, and the zero."""
        return [*(self.weights.leaves[i] for i in self._own), self.zero]

    def all_gather(self, pieces: Sequence[Tensor]) -> list[Tensor]:
        return self.backend.all_gather([p.detach() for p in pieces[:-1]], self.trainable, self._dtype)

    def reduce_scatter(self, wholes: Sequence[Tensor | None]) -> list[Tensor]:
        """Pieces of the sum over the shard group, and a zero."""
        cut = self.backend.reduce_scatter(wholes, self.trainable, self._dtype)
        return [*cut, torch.zeros_like(self.zero)]

    def put(self, wholes: Sequence[Tensor]) -> None:
        """Whole weights, the frozen ones too, where they belong (collective where frozen ones are sharded)."""
        frozen = self.skeleton.whole_frozen(self.frozen)
        filled = dict(zip((*self.trainable, *self.frozen), (*wholes, *frozen), strict=True))
        self.skeleton.fill(self.block.places, filled)

    def fill(self) -> None:
        """The same for weights that stay gathered as long as the graph that they are in."""
        if self.block.places:
            *wholes, _ = _Whole.apply(self, *self.pieces)
            self.put(wholes)


class _Whole(torch.autograd.Function):
    """Pieces to whole weights and a token; its derivative is `_Cut`. See [Note: every rank the same way back]."""

    @staticmethod
    def forward(ctx: Any, share: Share, *pieces: Tensor) -> tuple[Tensor, ...]:
        ctx.share, token = share, torch.zeros_like(share.zero)
        ctx.save_for_backward(token)
        return *(t.clone() for t in share.all_gather(pieces)), token

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        return None, *_Cut.apply(ctx.share, *cotangents[:-1], *ctx.saved_tensors)


class _Cut(torch.autograd.Function):
    """Whole tensors, each rank's share, and the token to pieces of their sum; its derivative is `_Whole`."""

    @staticmethod
    def forward(ctx: Any, share: Share, *wholes: Tensor) -> tuple[Tensor, ...]:
        ctx.share = share
        return tuple(t.clone() for t in share.reduce_scatter(wholes[:-1]))

    @staticmethod
    def backward(ctx: Any, *pieces: Tensor) -> tuple[Tensor | None, ...]:
        return None, *_Whole.apply(ctx.share, *pieces)


class Runner(Share):
    """A block whose forward gathers its weights, and whose derivatives do so again."""

    def __init__(self, weights: Blockwise, block: Block) -> None:
        super().__init__(weights, block)
        self._plain = block.module.forward
        block.module.forward = self  # type: ignore[assignment]

    def close(self) -> None:
        self.block.module.__dict__.pop("forward", None)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = _Call(self, args, kwargs)
        *out, _ = _Block.apply(call, *call.inputs, *self.pieces)
        return call.output(out)

    def run(self, call: _Call, inputs: Sequence[Tensor], wholes: Sequence[Tensor], *, again: bool) -> list[Any]:
        """The block's outputs, flat; `again` with the random numbers of the first time."""
        self.put(wholes)
        args, kwargs = call.arguments(inputs)
        try:
            with call.replaying() if again else nullcontext(), call.autocast(), self.weights.attention():
                flat, call.out_structure = tree_flatten(self._plain(*args, **kwargs))
        finally:
            self.skeleton.clear(self.block.places)
        return flat


class _Call:
    """One call of a block: what of its arguments is no tensor, and what autograd wants of those that are."""

    def __init__(self, runner: Runner, args: Any, kwargs: Any) -> None:
        self.runner = runner
        flat, self._structure = tree_flatten((args, kwargs))
        self._flat = [None if isinstance(t, Tensor) else t for t in flat]
        self._at = [i for i, t in enumerate(flat) if isinstance(t, Tensor)]
        self.inputs = [flat[i] for i in self._at]
        self.count = len(self._at)
        self.wanted = [i for i, t in enumerate(self.inputs) if t.requires_grad]
        self._device = runner.weights.backend.compute_device
        on_gpu = self._device.type == "cuda"
        self._random = torch.get_rng_state(), torch.cuda.get_rng_state(self._device) if on_gpu else None
        kind = self._device.type
        self._autocast = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        self.out_structure: Any = None
        self.differentiable: list[int] = []

    def arguments(self, inputs: Sequence[Tensor]) -> Any:
        flat = list(self._flat)
        for i, t in zip(self._at, inputs, strict=True):
            flat[i] = t
        return tree_unflatten(flat, self._structure)

    def autocast(self) -> Any:
        """Autocast as it was at the call: backward passes run the block again where the loss has left its context."""
        enabled, dtype = self._autocast
        return torch.autocast(self._device.type, dtype=dtype, enabled=enabled, cache_enabled=False)

    @contextmanager
    def replaying(self) -> Iterator[None]:
        with torch.random.fork_rng(devices=[self._device] if self._device.type == "cuda" else []):
            cpu, cuda = self._random
            torch.set_rng_state(cpu)
            if cuda is not None:
                torch.cuda.set_rng_state(cuda, self._device)
            yield

    def output(self, tensors: Sequence[Tensor]) -> Any:
        """The block's output as it gave it, with these tensors in it."""
        given = iter(tensors)
        flat = [next(given) if isinstance(t, Tensor) else t for t in self._out]
        return tree_unflatten(flat, self.out_structure)

    def keep(self, flat: Sequence[Any]) -> tuple[Tensor, ...]:
        """Remember the outputs' places; the tensors among them."""
        tensors = [t for t in flat if isinstance(t, Tensor)]
        self._out = [torch.empty(0) if isinstance(t, Tensor) else t for t in flat]
        self.differentiable = [i for i, t in enumerate(tensors) if t.is_floating_point()]
        return tuple(tensors)

    def split(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Inputs, pieces, and what follows them."""
        n, m = len(self._at), len(self.runner.pieces)
        return list(tensors[:n]), list(tensors[n : n + m]), list(tensors[n + m :])

    def leaves(self, inputs: Sequence[Tensor], pieces: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Inputs and whole weights to differentiate by."""
        xs = [t.detach().requires_grad_(i in self.wanted) for i, t in enumerate(inputs)]
        return xs, [t.detach().requires_grad_() for t in self.runner.all_gather(pieces)]

    def backward(
        self, xs: Sequence[Tensor], ws: Sequence[Tensor], cotangents: Sequence[Tensor], *, create_graph: bool
    ) -> list[Tensor | None]:
        """Run the block again and back: dL/dx of the wanted inputs, then dL/dw, this rank's share."""
        outputs = [t for t in self.runner.run(self, xs, ws, again=True) if isinstance(t, Tensor)]
        ys = [(outputs[i], cotangents[i]) for i in self.differentiable if outputs[i].requires_grad]
        by = [*(xs[i] for i in self.wanted), *ws]
        if not ys or not by:
            return [None] * len(by)
        y, back = zip(*ys, strict=True)
        return list(torch.autograd.grad(y, by, back, create_graph=create_graph, allow_unused=True))


class _Block(torch.autograd.Function):
    """x, pieces -> y and a token; see both notes above."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *tensors: Tensor) -> tuple[Tensor, ...]:
        inputs, pieces, _ = call.split(tensors)
        out = call.keep(call.runner.run(call, inputs, call.runner.all_gather(pieces), again=False))
        ctx.call, token = call, torch.zeros_like(call.runner.zero)
        ctx.save_for_backward(*tensors, token)
        given = {id(t) for t in inputs}
        out = tuple(t.clone() if id(t) in given else t for t in out)
        return *out, token

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        call, (*tensors, token) = ctx.call, ctx.saved_tensors
        found = list(_BlockGradient.apply(call, *tensors, *cotangents[:-1], token))
        by_input = dict(zip(call.wanted, found, strict=False))
        xs = [by_input.get(i) for i in range(call.count)]
        return None, *xs, *found[len(call.wanted) :]


class _BlockGradient(torch.autograd.Function):
    """x, pieces, dL/dy, token -> dL/dx of the wanted inputs, dL/dpieces."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *tensors: Tensor) -> tuple[Tensor, ...]:
        inputs, pieces, (*cotangents, _) = call.split(tensors)
        ctx.call = call
        ctx.save_for_backward(*tensors)
        with torch.enable_grad():
            xs, ws = call.leaves(inputs, pieces)
            found = call.backward(xs, ws, cotangents, create_graph=False)
        n = len(call.wanted)
        by_x = [torch.zeros_like(xs[i]) if g is None else g for i, g in zip(call.wanted, found[:n], strict=True)]
        return *by_x, *call.runner.reduce_scatter(found[n:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *directions: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        call = ctx.call
        inputs, pieces, (*cotangents, token) = call.split(ctx.saved_tensors)
        n = len(call.wanted)
        with torch.enable_grad():
            xs, ws = call.leaves(inputs, pieces)
            back = [t.detach().requires_grad_(t.is_floating_point()) for t in cotangents]
            found = call.backward(xs, ws, back, create_graph=True)
            along = [*directions[:n], *call.runner.all_gather(directions[n:])]
            pairs = [(g, v) for g, v in zip(found, along, strict=True) if g is not None and g.requires_grad]
            by = [*(xs[i] for i in call.wanted), *ws, *(back[i] for i in call.differentiable)]
            second: list[Tensor | None] = [None] * len(by)
            if pairs and by:
                g, v = zip(*pairs, strict=True)
                second = list(torch.autograd.grad(g, by, v, allow_unused=True))
        by_input = dict(zip(call.wanted, second[:n], strict=True))
        by_output = dict(zip(call.differentiable, second[n + len(ws) :], strict=True))
        return (
            None,
            *(by_input.get(i) for i in range(len(inputs))),
            *call.runner.reduce_scatter(second[n : n + len(ws)]),
            *(by_output.get(i) for i in range(len(cotangents))),
            torch.zeros_like(token),
        )
