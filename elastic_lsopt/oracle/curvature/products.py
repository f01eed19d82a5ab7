"""Products of the loss's Hessian and Gauss-Newton matrix with vectors; v and the result are sharded.

    H v = d/dw <g(w), v>     g = dL/dw, differentiated twice (Pearlmutter 1994, "Fast exact multiplication …")
    G v = J' B J v           J = dz/dw of the logits z, B = d2L/dz2 (Schraudolph 2002, "Fast curvature matrix-vector …")

    mode         weights                 each product                                          gradients
    kept         all gathered            through a differentiated graph that is kept           2
    rebuilt      all gathered            builds the graph of one micro-batch after the other          3
    blockwise    one block at a time     through a graph that holds what is between blocks     4
    differences  as memory allows        (g(w + h v) - g(w - h v)) / 2h, `differences.py`      2

`auto` takes the first that fits the memory there is, and differences (with a warning) where autograd cannot
differentiate the model twice. The first three are exact to rounding, in the space's precision, whatever the engine's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import wraps
from typing import Any, Concatenate, Literal, ParamSpec, TypeVar, get_args

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from elastic_lsopt.errors import PeerFailed, Unsupported, UserError
from elastic_lsopt.oracle.curvature.blockwise import Blockwise
from elastic_lsopt.oracle.curvature.differences import Differences, Product
from elastic_lsopt.oracle.curvature.free_memory import available_bytes
from elastic_lsopt.oracle.curvature.skeleton import Skeleton
from elastic_lsopt.oracle.curvature.skeleton_weights import Gathered, Weights
from elastic_lsopt.oracle.gradient_engine import GradientEngine
from elastic_lsopt.oracle.losses.loss import Loss
from elastic_lsopt.oracle.replay.slot import Slot
from elastic_lsopt.space.geometry import ParameterSpace
from elastic_lsopt.space.upload import on_device
from elastic_lsopt.space.vector import Vector

Mode = Literal["auto", "kept", "rebuilt", "blockwise", "differences"]
Parts = list[Tensor | None]
"""What autograd gives for the leaves: this rank's share."""
Graph = Callable[[Sequence[Tensor]], Parts]
"""From directions, shaped like the leaves, to this rank's share of the product."""

GATHERED_SHARE, GRAPH_SHARE = 0.4, 0.6
"""Of the memory there is: what whole weights and two whole vectors may take, then what a kept graph may take."""


def refuse_unknown(mode: str) -> None:
    """Raise UserError for a mode that there is not."""
    if mode not in get_args(Mode):
        raise UserError(f"products={mode!r} is unknown; use one of {', '.join(get_args(Mode))}.")


P = ParamSpec("P")
R = TypeVar("R")


def _unrounded(ask: Callable[Concatenate[Products, P], R]) -> Callable[Concatenate[Products, P], R]:
    """Out of the autocast context around the caller: products are exact to rounding in the precision they state."""

    @wraps(ask)
    def asked(self: Products, *args: P.args, **kwargs: P.kwargs) -> R:
        with torch.autocast(self.backend.compute_device.type, enabled=False):
            return ask(self, *args, **kwargs)

    return asked


class Products:
    """The curvature of the loss on `slots`, this rank's forwards, at the weights where the space is (all collective).

    A kept graph is built at the first product and again when the weights have changed; `close` frees it. `mode` is what
    is asked for, `chosen` what is used; `once`: one product is wanted, so that `auto` keeps no graph. `dtype` is the
    precision of the passes (None: the space's). Raises Unsupported for a mode that this model cannot have, UserError
    for an unknown one.
    """

    def __init__(
        self,
        space: ParameterSpace,
        backend: GradientEngine,
        loss: Any,
        slots: Sequence[Slot],
        mode: Mode,
        dtype: torch.dtype | None = None,
        *,
        once: bool = False,
    ) -> None:
        refuse_unknown(mode)
        self.space, self.backend, self.loss = space, backend, loss
        self.slots, self.dtype = slots, dtype or space.dtype
        self.mode: Mode = mode
        self.chosen: Mode = mode
        self._slots = [replace(slot, batch=tree_map(self._fitting, slot.batch)) for slot in slots]
        self._weights: Weights | None = None
        self._keep: bool | None = False if once else {"kept": True, "rebuilt": False}.get(mode)
        self._blockwise: bool | None = {"kept": False, "rebuilt": False, "blockwise": True}.get(mode)
        self._graphs: dict[Any, Graph] = {}
        self._stamp: Any = None
        self._differences: Differences | None = None

    def _fitting(self, t: Any) -> Any:
        """Inputs for an engine in bf16 go into a skeleton in fp32; into one in bf16 goes nothing else."""
        if not isinstance(t, Tensor) or not t.is_floating_point():
            return t
        return t.to(self.dtype) if t.dtype.itemsize < self.dtype.itemsize or self.dtype.itemsize < 4 else t

    # -- what others ask ---------------------------------------------------------------------------------------

    @_unrounded
    def hvp(self, v: Vector) -> Product:
        """H v. Cost: see the table above; one AllGather of v and one ReduceScatter of the result, or each block's."""
        weights = self._at_the_weights()
        if self.chosen == "differences":
            if self._differences is None:
                self._differences = Differences(self.space, self.difference)
            return self._differences.product(v)
        return Product(self.space, self._product(weights, self._hessian_graph, v).tensors, None)

    @_unrounded
    def ggn_vp(self, v: Vector) -> Product:
        """G v, without a second derivative of the model; 2 gradients where kept. Memory: one tensor like the logits.

        Raises UserError for a loss that is not split, Unsupported where J v cannot be had from autograd.
        """
        if not isinstance(self.loss, Loss):
            raise UserError(
                "Gauss-Newton products need the loss in two steps; pass lso.Loss(forward, criterion, count) as loss_fn."
            )
        weights = self._at_the_weights()
        if self.chosen == "differences":
            raise Unsupported("Gauss-Newton products by differences are not supported: the model needs exact products.")
        return Product(self.space, self._product(weights, self._gauss_newton_graph, v).tensors, None)

    @_unrounded
    def gradient(self) -> Vector:
        """dL/dw through the skeleton, as an own vector."""
        weights = self._at_the_weights()
        return weights.collect(self._parts_at(weights, None, 0.0))

    def close(self) -> None:
        """Free the graph and the gathered weights; the next product makes them anew."""
        self._graphs.clear()
        if self._weights is not None:
            self._weights.close()
        self._weights, self._stamp, self._differences = None, None, None

    # -- weights and mode --------------------------------------------------------------------------------------

    def _at_the_weights(self) -> Weights:
        """The weights where the space is now, and the mode.

        Weights are written in place, which autograd counts: on the tensor that was written, so a DTensor's step shows
        on the DTensor (a slot's key), and a perturbation on its local part. Fused optimizers and `.data` are not
        counted: they show in sums of the weights. A rank without a piece sees nothing of
        either, so all ranks ask each other: one small all-reduce.
        """
        space, shards = self.space, self.backend
        space.copies.ready()
        module = shards.module
        assert module is not None
        others = [*(p for p in module.parameters() if not p.requires_grad), *module.buffers()]
        written = [t._version for t in (*shards.masters, *shards.working, *shards.slot_keys, *others)]
        modes = [m.training for m in module.modules()]
        stamp = (space.copies.perturbations, space.copies.edits, written, modes, _fingerprint(shards.masters))
        if self._all_agree(self._weights is not None and stamp == self._stamp):
            assert self._weights is not None
            return self._weights
        self.close()
        if self._blockwise is None:
            self._blockwise = not self._gathered_fits()
        kind = Blockwise if self._blockwise else Gathered
        self._weights = kind(self.space, Skeleton(self.backend, self.dtype), twice=self.chosen != "differences")
        self._stamp = stamp
        if self._keep is None and self.chosen != "differences":
            self._keep = self._graph_fits(self._weights)
        if self.chosen == "auto":
            self.chosen = "blockwise" if self._blockwise else "kept" if self._keep else "rebuilt"
        return self._weights

    def use_differences(self) -> None:
        """From now on by central differences."""
        self.close()
        self.chosen = "differences"

    def _gathered_fits(self) -> bool:
        needed = 3 * self.space.layout.numel * self.dtype.itemsize
        return self._all_agree(needed < GATHERED_SHARE * available_bytes(self.backend.compute_device))

    def _graph_fits(self, weights: Weights) -> bool:
        """Build the graph of one micro-batch and count what it saves."""
        saved: dict[int, int] = {}

        def count(t: Tensor) -> Tensor:
            storage = t.untyped_storage()
            saved[storage.data_ptr()] = storage.nbytes()
            return t

        slots = self._running(weights)
        with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
            graph = self._hessian_graph(weights, slots[:1]) if slots else None
        for leaf in weights.leaves:
            saved.pop(leaf.untyped_storage().data_ptr(), None)
        del graph
        needed = sum(saved.values()) * len(slots)
        return self._all_agree(needed < GRAPH_SHARE * available_bytes(self.backend.compute_device))

    def _all_agree(self, mine: bool) -> bool:
        vote = torch.tensor([float(not mine)], dtype=torch.float64, device=self.backend.compute_device)
        return not self.backend.sum_replica_(vote).item()

    def _running(self, weights: Weights) -> list[Slot]:
        """The forwards to run: idle ones only where the others would wait for them."""
        return [s for s in self._slots if s.share or weights.communicates]

    # -- products ----------------------------------------------------------------------------------------------

    def _product(self, weights: Weights, build: Callable[[Weights, Sequence[Slot]], Graph], v: Vector) -> Vector:
        directions = weights.spread(v)
        total: Parts = [None] * len(weights.leaves)
        with self._together():
            for graph in self._graphs_by(weights, build):
                _add(total, graph(directions))
                del graph  # before the next micro-batch's is built
        return weights.collect(total)

    @contextmanager
    def _together(self) -> Iterator[None]:
        """What autograd raises inside on one rank is raised on all, before they meet in the next collective."""
        error: Exception | None = None
        try:
            yield
        except (PeerFailed, torch.OutOfMemoryError):
            raise
        except Exception as raised:
            error = raised
        if self._all_agree(error is None):
            return
        raise error if error is not None else RuntimeError("another rank cannot make this product")

    def _graphs_by(self, weights: Weights, build: Callable[[Weights, Sequence[Slot]], Graph]) -> Iterator[Graph]:
        """All micro-batches in one kept graph, or one micro-batch's after the other."""
        slots = self._running(weights)
        if not self._keep:
            yield from (build(weights, [slot]) for slot in slots)
        elif slots:
            key = build.__name__
            if key not in self._graphs:
                self._graphs[key] = build(weights, slots)
            yield self._graphs[key]

    def _sum(self, weights: Weights, slots: Sequence[Slot]) -> Tensor:
        """The weighted sum of the slots' losses: this rank's share of the loss."""
        with torch.enable_grad(), weights.attention():
            values = [s.value(self.loss, weights.model, self.backend.compute_device) * (s.share or 1.0) for s in slots]
            return torch.stack(values).sum()

    def _hessian_graph(self, weights: Weights, slots: Sequence[Slot]) -> Graph:
        leaves = weights.leaves
        g = torch.autograd.grad(self._sum(weights, slots), leaves, create_graph=True, allow_unused=True)
        return lambda directions: _pull(g, directions, leaves, keep=bool(self._keep))

    def _gauss_newton_graph(self, weights: Weights, slots: Sequence[Slot]) -> Graph:
        """J v as the derivative, by u, of J' u, which is linear in u; u is one zero that is read many times."""
        leaves, keep, device = weights.leaves, bool(self._keep), self.backend.compute_device
        microbatch: list[tuple[Slot, Tensor, Tensor, Sequence[Tensor | None]]] = []
        for slot in slots:
            with torch.enable_grad(), weights.attention():
                z = slot.logits(self.loss, weights.model, device)
            u = torch.zeros((), dtype=z.dtype, device=z.device).expand(z.shape).requires_grad_()
            microbatch.append((slot, z, u, torch.autograd.grad(z, leaves, u, create_graph=True, allow_unused=True)))

        def product(directions: Sequence[Tensor]) -> Parts:
            total: Parts = [None] * len(leaves)
            for slot, z, u, back in microbatch:
                [tangent] = _pull(back, directions, [u], keep=True)
                tangent = torch.zeros_like(z) if tangent is None else tangent
                if any(tangent.untyped_storage().data_ptr() == d.untyped_storage().data_ptr() for d in directions):
                    tangent = tangent.clone()  # the caller's own vector, and what follows writes
                if slot.share:
                    tangent = self.loss.output_product(z.detach(), slot.batch, tangent).mul_(slot.share)
                else:
                    tangent = torch.zeros_like(tangent)
                _add(total, torch.autograd.grad(z, leaves, tangent, retain_graph=keep, allow_unused=True))
            return total

        return product

    @_unrounded
    def difference(self, v: Vector, h: float) -> Vector:
        """(g(w + h v) - g(w - h v)) / 2h: two gradients, their difference in the precision of the passes."""
        weights = self._at_the_weights()
        there, back = self._parts_at(weights, v, h), self._parts_at(weights, v, -h)
        apart: Parts = [
            None if a is None or b is None else (a - b) * (0.5 / h) for a, b in zip(there, back, strict=True)
        ]
        return weights.collect(apart)

    @_unrounded
    def values(self, change: Callable[[Any], Any]) -> float:
        """The loss with a change of each batch, but with the batch's own weights; no gradient."""
        weights = self._at_the_weights()
        local: float | Tensor = 0.0
        with torch.no_grad(), self._together():
            for slot in self._running(weights):
                changed = replace(slot, batch=change(slot.batch))
                value = changed.value(self.loss, weights.model, self.backend.compute_device)
                if slot.share:
                    local = local + value.double() * slot.share
        return self.backend.sum_replica_(on_device([local], self.backend.compute_device)).item()

    def _parts_at(self, weights: Weights, direction: Vector | None, scale: float) -> Parts:
        """This rank's share of dL/dw at w + scale * direction."""
        total: Parts = [None] * len(weights.leaves)
        with weights.moved(direction, scale) if direction is not None else nullcontext(), self._together():
            for slot in self._running(weights):
                _add(total, torch.autograd.grad(self._sum(weights, [slot]), weights.leaves, allow_unused=True))
        return total


def _fingerprint(tensors: Sequence[Tensor]) -> list[float]:
    """Sums and lengths of this rank's weights: a pass over its shard, nothing beside a product."""
    if not tensors:
        return []
    numbers = [*torch._foreach_norm(list(tensors)), *(t.sum() for t in tensors)]
    return torch.stack([n.double() for n in numbers]).tolist()


def _pull(outputs: Sequence[Tensor | None], by: Sequence[Tensor], leaves: Sequence[Tensor], *, keep: bool) -> Parts:
    """d<outputs, by>/dleaves; None where nothing leads there."""
    pairs = [(g, v) for g, v in zip(outputs, by, strict=True) if g is not None and g.requires_grad]
    if not pairs:
        return [None] * len(leaves)
    gs, vs = zip(*pairs, strict=True)
    return list(torch.autograd.grad(gs, leaves, vs, retain_graph=keep, allow_unused=True))


def _add(total: Parts, more: Sequence[Tensor | None]) -> None:
    """total += more. Never in place: autograd may hand out a tensor that it keeps."""
    for i, t in enumerate(more):
        if t is not None:
            mine = total[i]
            total[i] = t if mine is None else mine + t
