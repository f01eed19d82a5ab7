"""A model's own initialisation, replayed range by range: the same bytes at any world size and on any backend.

transformers' `initialize_weights` runs once on a model without memory, and what it does to each parameter is noted: a
few element-wise operations, such as `normal_(0, 0.02)` and the zeros of a row. They are replayed in blocks of BLOCK
elements with a seed for each (parameter, block), so a rank draws the blocks of its own shard and no others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from elastic_lsopt.checkpoint.huggingface.weights import initialising
from elastic_lsopt.errors import Unsupported
from elastic_lsopt.space.random.noise import block_seed

BLOCK = 1 << 16
RANDOM = frozenset({"normal_", "uniform_", "bernoulli_", "exponential_", "log_normal_", "cauchy_"})
ELEMENTWISE = RANDOM | {
    "zero_", "fill_", "mul_", "add_", "sub_", "div_", "clamp_", "clamp_min_", "clamp_max_", "erfinv_", "log_", "exp_",
    "neg_", "sqrt_", "abs_", "reciprocal_", "copy_",
}  # fmt: skip
"""In-place operations whose result at an element depends on that element alone."""


@dataclass(frozen=True)
class _Call:
    """An in-place operation on elements [begin, end) of a flattened parameter; a tensor among its arguments has their
    shape."""

    name: str
    arguments: tuple[Any, ...]
    begin: int
    end: int


class DrawnWeights:
    """The initial weights of a transformers model without memory, drawn from `seed`; with `initialise` those that it
    gives, and no others.

    Raises Unsupported, before anything is drawn, for a model whose initialisation is more than operations on single
    elements (an orthogonal matrix, say): it can only be drawn whole.
    """

    def __init__(self, model: Any, seed: int, initialise: Callable[[], None] | None = None) -> None:
        self._seed = seed
        self._numel = {name: p.numel() for name, p in model.named_parameters(remove_duplicate=False)}
        first = {id(p): name for name, p in model.named_parameters()}
        self._first = {name: first[id(p)] for name, p in model.named_parameters(remove_duplicate=False)}
        self._calls = _recorded(model) if initialise is None else _recorded_of(model, initialise)

    def holds(self, name: str) -> bool:
        return self._first.get(name) in self._calls

    def copy_to(self, target: Tensor, name: str, offset: int) -> None:
        """Write elements [offset, offset + target.numel()) of the flattened parameter `name`, a tied one under any of
        its names, into `target`. Costs the blocks that hold them; scratch memory of one block."""
        name, end = self._first[name], offset + target.numel()
        for number in range(offset // BLOCK, -(-end // BLOCK)):
            low = number * BLOCK
            block = self._block(name, number)
            begin, stop = max(offset, low), min(end, low + block.numel())
            target[begin - offset : stop - offset].copy_(block[begin - low : stop - low])

    def _block(self, name: str, number: int) -> Tensor:
        low = number * BLOCK
        out = torch.zeros(min(BLOCK, self._numel[name] - low))
        generator = torch.Generator().manual_seed(block_seed(self._seed, "initial weights", name, number))
        for call in self._calls[name]:
            begin, end = max(call.begin, low), min(call.end, low + out.numel())
            if begin < end:
                arguments = [
                    a.reshape(-1)[begin - call.begin : end - call.begin] if isinstance(a, Tensor) and a.dim() else a
                    for a in call.arguments
                ]
                own = {"generator": generator} if call.name in RANDOM else {}
                getattr(out[begin - low : end - low], call.name)(*arguments, **own)
        return out


class _Recorder(TorchDispatchMode):
    """Notes what happens in place to the memory of some parameters."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self._name_of = {p.untyped_storage()._cdata: name for name, p in model.named_parameters()}
        self.calls: dict[str, list[_Call]] = {name: [] for name in self._name_of.values()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        if func._schema.is_mutable and args and isinstance(args[0], Tensor):
            name = self._name_of.get(args[0].untyped_storage()._cdata)
            if name is not None:
                operation = func._schema.name.split("::")[1]
                self._note(name, operation, args[0], args[1:], {k: v for k, v in given.items() if k != "generator"})
                return args[0]  # there is no memory to write, and finding out as much takes torch milliseconds
        return func(*args, **given)

    def _note(self, name: str, operation: str, target: Tensor, arguments: Any, named: dict[str, Any]) -> None:
        tensors = [a for a in arguments if isinstance(a, Tensor)]
        known = operation in ELEMENTWISE and not named.keys() - {"non_blocking"} and target.is_contiguous()
        # Values that were computed from parameters without memory are not known here.
        if not known or any(t.is_meta or (t.dim() and t.shape != target.shape) for t in tensors):
            raise Unsupported(f"the initialisation of {name} by {operation} does not go element by element")
        begin = int(target.storage_offset())
        self.calls[name].append(_Call(operation, tuple(arguments), begin, begin + target.numel()))


def _recorded(model: Any) -> dict[str, list[_Call]]:
    with initialising(model) as initialise, _Recorder(model) as recorder:
        initialise()
    missing = next((name for name, calls in recorder.calls.items() if not calls), None)
    if missing is not None:
        raise Unsupported(f"the initialisation leaves {missing} as it is")
    return recorder.calls


@torch.no_grad()
def _recorded_of(model: Any, initialise: Callable[[], None]) -> dict[str, list[_Call]]:
    with _Recorder(model) as recorder:
        initialise()
    return {name: calls for name, calls in recorder.calls.items() if calls}
