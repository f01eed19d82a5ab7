"""What is alive in memory during one micro-batch's forward and backward, counted on tensors that have no storage.

The model is built on the meta device and runs once under torch's FakeTensorMode: each operation gives tensors with a
shape, a type and an owner, and no bytes. What the autograd graph holds, when a block's activations go, what a loss
takes of the logits: nothing is guessed, for any model. For a transformer it comes to these forms, to which the tests
hold it (s tokens of b samples, h hidden, a heads, v ids; e bytes an element; Korthikanti et al., "Reducing Activation
Recomputation in Large Transformer Models", 2022, section 4.1):

    a GPT-2 block, 16 bits, eager       s b h (34 + 5 a s / h); without dropout s b h (32 + 2 a s / h)
    ... its attention by sdpa           without the terms in a s^2: it keeps its output and a log-sum per token and head
    with activation checkpointing       e s b h per block, and one block's own while it is done again
    logits of a causal LM               s b v times: e for themselves, 4 for a copy in fp32, 4 for their log-softmax
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Shapes = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
"""A micro-batch: the shape and the type of each of its tensors."""
Kind = Literal["forward", "backward"]


@dataclass(frozen=True)
class Segment:
    """A stretch of the pass in which the same block works; `block` None: what belongs to none (embedding, head, loss).

    Most bytes alive in it, parameters themselves left out.
    """

    kind: Kind
    block: int | None
    activations: int
    """Without gradients of parameters."""
    with_own_gradients: int
    """With those of this block, and of what belongs to no block, so far: what a sharding backend holds whole."""
    with_gradients: int
    """With those of all parameters so far."""
    left: int
    """Activations at its end."""


@dataclass(frozen=True)
class Pass:
    """One micro-batch's forward and backward, in order."""

    segments: tuple[Segment, ...]
    saved: int
    """Bytes that the graph keeps from the forward for the backward."""

    @property
    def activations(self) -> int:
        return max(s.activations for s in self.segments)


def run_without_storage(
    model: nn.Module,
    loss: Callable[[Any, Any], Tensor],
    batch: Shapes,
    blocks: Sequence[nn.Module],
    *,
    dtype: torch.dtype | None = None,
) -> Pass:
    """One micro-batch of a model that was built on the meta device, whose weights are taken to be of `dtype` (None: of
    their own).

    Whatever an operation raises that cannot run without numbers (a router that looks at its tokens) is passed on.
    About 0.1 s per block.
    """
    with FakeTensorMode(), _one_document_per_row(), ExitStack() as undo:
        parameters = _as_fake(model, dtype)
        rest = {id(p) for p in parameters} - {id(p) for block in blocks for p in block.parameters()}
        inputs = {name: torch.zeros(shape, dtype=kind) for name, (shape, kind) in batch.items()}
        account = _Account(outside=[*parameters, *model.buffers(), *inputs.values()])
        for number, block in enumerate(blocks):
            for handle in _watch(block, number, account):
                undo.callback(handle.remove)
        for p in parameters:
            if p.requires_grad:
                hook = account.gradient_hook(in_no_block=id(p) in rest)
                undo.callback(p.register_post_accumulate_grad_hook(hook).remove)
        with account:
            value = loss(model, inputs)
            saved = account.alive
            account.enter("backward", None)
            value.backward()
            del value
        return Pass(tuple(account.closed()), saved)


@contextmanager
def _one_document_per_row() -> Iterator[None]:
    """transformers looks into the positions for several documents in a row; of a tensor without numbers it takes them
    to be several, and builds a mask that the real pass has not."""
    masks: Any = sys.modules.get("transformers.masking_utils")
    if masks is None:
        yield
        return
    looks = masks.find_packed_sequence_indices
    masks.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masks.find_packed_sequence_indices = looks


def _as_fake(model: nn.Module, dtype: torch.dtype | None) -> list[nn.Parameter]:
    """Weights and buffers of a meta model as fake ones on the CPU, tied ones still one; in place."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                if id(p) not in made:
                    kind = dtype if dtype is not None and p.is_floating_point() else p.dtype
                    made[id(p)] = nn.Parameter(torch.empty(p.shape, dtype=kind), requires_grad=p.requires_grad)
                module._parameters[name] = made[id(p)]
        for name, b in module._buffers.items():
            if b is not None:
                module._buffers[name] = torch.empty(b.shape, dtype=b.dtype)
    return list(made.values())


def _watch(block: nn.Module, number: int, account: _Account) -> list[Any]:
    """Tell the account when the block begins and ends, forward by its hooks, backward by its tensors' gradients."""

    def begins(module: nn.Module, given: Any, named: Any) -> None:
        account.enter("forward", number)
        for t in tree_leaves((given, named)):
            if isinstance(t, Tensor) and t.requires_grad:
                t.register_hook(lambda g: account.leave(number))

    def ends(module: nn.Module, given: Any, out: Any) -> None:
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and t.requires_grad:
                t.register_hook(lambda g: account.enter("backward", number))
        account.enter("forward", None)

    return [block.register_forward_pre_hook(begins, with_kwargs=True), block.register_forward_hook(ends)]


@dataclass
class _Open:
    """A segment under way."""

    kind: Kind = "forward"
    block: int | None = None
    own: int = 0
    left: int = 0
    peaks: list[int] = field(default_factory=lambda: [0, 0, 0])


class _Account(TorchDispatchMode):
    """Counts storages from the operation that makes them until their last tensor goes."""

    def __init__(self, outside: Sequence[Tensor]) -> None:
        super().__init__()
        self.alive = 0
        self._known: dict[int, Any] = {t.untyped_storage()._cdata: t for t in outside}
        self._open, self._segments = _Open(), list[_Open]()
        self._rest = self._all = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in [out] if isinstance(out, Tensor) else tree_leaves(out) if isinstance(out, tuple | list) else ():
            if isinstance(t, Tensor):
                self._note(t)
        return out

    def _note(self, t: Tensor) -> None:
        storage = t.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return

        def gone(_: Any) -> None:
            del self._known[key]
            self.alive -= size

        self._known[key] = weakref.ref(storage, gone)
        self.alive += size
        self._look()

    def _look(self) -> None:
        own, peaks = self.alive + self._open.own + self._rest, self._open.peaks
        for i, now in enumerate((self.alive, own, self.alive + self._all)):
            peaks[i] = max(peaks[i], now)

    def gradient_hook(self, *, in_no_block: bool) -> Callable[[Tensor], None]:
        """From now on the gradient is counted by its size alone, as what a backend makes of it."""

        def hook(p: Tensor) -> None:
            size = p.numel() * p.element_size()
            p.grad = None
            self._all += size
            if in_no_block:
                self._rest += size
            else:
                self._open.own += size
            self._look()

        return hook

    def enter(self, kind: Kind, block: int | None) -> None:
        if (kind, block) != (self._open.kind, self._open.block):
            self._open.left = self.alive
            self._segments.append(self._open)
            self._open = _Open(kind, block)
        self._look()

    def leave(self, block: int) -> None:
        """The gradient of a block's input is there; it is also the output of the block before, which has begun then."""
        if self._open.block == block:
            self.enter("backward", None)

    def closed(self) -> list[Segment]:
        self._open.left = self.alive
        return [
            Segment(o.kind, o.block, o.peaks[0], o.peaks[1], o.peaks[2], o.left) for o in [*self._segments, self._open]
        ]
