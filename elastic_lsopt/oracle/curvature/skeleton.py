"""A model's structure without its framework: the user's own classes, no hooks, and weights that we put in.

An engine's forward cannot be differentiated twice (FSDP2 frees what it gathered, ZeRO's hooks know one backward), so
products with the curvature run through this instead. Whatever the hooks of the user's own added is not in it either:
`Products` compares its gradient with the engine's before the first product.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from elastic_lsopt.errors import Unsupported
from elastic_lsopt.oracle.gradient_engine import GradientEngine
from elastic_lsopt.space.layout import plain_name

_HOOKS = (
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs", "_forward_hooks_always_called",
)  # fmt: skip
_LEFT_OUT = {"_parameters", "_buffers", "_modules", "forward", "_compiled_call_impl", *_HOOKS}


class Absent(Tensor):
    """The place of a weight that is not there: whatever computes with it raises Unsupported. (CPU kernels take a meta
    tensor for a weight without a word, and give garbage.)
    """

    parameter: str

    @classmethod
    def of(cls, name: str, meta: Tensor) -> Absent:
        out = meta.as_subclass(cls)
        out.parameter = name
        return out

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__ in ("__get__", "dim", "size", "numel", "is_floating_point", "__repr__"):
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        name = next((a.parameter for a in args if isinstance(a, Absent)), "")
        raise Unsupported(
            f"parameter {name} is used outside of its own module's forward, where products='blockwise' does not have "
            "it; use rebuilt or kept."
        )


@dataclass(frozen=True)
class Place:
    """Where a weight belongs: `source` counts the trainable parameters first, then the frozen ones."""

    owner: nn.Module
    name: str
    source: int


class Skeleton:
    """`module` has the structure of the backend's; its parameters are on the meta device until `fill`.

    `frozen` are the distinct parameters that are not trained, as the framework holds them. Buffers are copies, in the
    space's precision. Raises Unsupported for a module that is not known by its parameters (a closure's).
    """

    def __init__(self, backend: GradientEngine, dtype: torch.dtype) -> None:
        if backend.module is None:
            raise Unsupported("products with the curvature need the module; attach it with lso.attach(model, …).")
        backend.drop_gathered()  # a gathered FSDP2 group hides its sharded parameters
        self.backend, self.dtype = backend, dtype
        named = {plain_name(name): p for name, p in backend.module.named_parameters()}
        self._number = {id(named[p.name]): i for i, p in enumerate(backend.layout.parameters)}
        self.trainable = len(self._number)
        self.frozen: list[Tensor] = []
        self.places: list[Place] = []
        self._made: dict[int, nn.Module] = {}
        self._configs: dict[int, Any] = {}
        self.module = self._copy(backend.module)
        self._empty = self._meta()
        self.fill(self.places, self._empty)

    def _copy(self, module: nn.Module) -> nn.Module:
        if id(module) in self._made:
            return self._made[id(module)]
        module = getattr(module, "_orig_mod", module)  # torch.compile's wrapper
        kind = self.backend.plain_class(module)
        new: Any = kind.__new__(kind)
        self._made[id(module)] = new
        state = {k: v for k, v in module.__dict__.items() if k not in _LEFT_OUT}
        if "gradient_checkpointing" in state:
            state["gradient_checkpointing"] = False  # what is recomputed is decided here
        for name, value in state.items():
            # A cache of keys and values would grow at each recomputation.
            if getattr(value, "use_cache", False) is True:
                state[name] = self._without_cache(value)
        new.__dict__.update(state)
        for hooks in _HOOKS:
            new.__dict__[hooks] = type(module.__dict__[hooks])()
        new.__dict__["_buffers"] = {k: self._buffer(b) for k, b in module._buffers.items()}
        new.__dict__["_parameters"] = dict.fromkeys(module._parameters)
        for name, p in module._parameters.items():
            if p is not None:
                self.places.append(Place(new, name, self._source(p)))
        new.__dict__["_modules"] = {k: None if m is None else self._copy(m) for k, m in module._modules.items()}
        return new

    def _without_cache(self, config: Any) -> Any:
        """A copy of a Hugging Face config, one for all modules that share it."""
        if id(config) not in self._configs:
            self._configs[id(config)] = copy(config)
            self._configs[id(config)].use_cache = False
        return self._configs[id(config)]

    def _buffer(self, buffer: Tensor | None) -> Tensor | None:
        if buffer is None:
            return None
        return buffer.detach().to(self.dtype if buffer.is_floating_point() else buffer.dtype, copy=True)

    def _source(self, parameter: Tensor) -> int:
        """Tied parameters are one object, and one source."""
        if id(parameter) not in self._number:
            self._number[id(parameter)] = self.trainable + len(self.frozen)
            self.frozen.append(parameter)
        return self._number[id(parameter)]

    def _meta(self) -> list[Tensor]:
        every = [(p.name, p.shape) for p in self.backend.layout.parameters]
        every += [("that is not trained", self.backend.full_shape(p)) for p in self.frozen]
        return [Absent.of(name, torch.empty(shape, dtype=self.dtype, device="meta")) for name, shape in every]

    def whole_frozen(self, sources: Sequence[int]) -> list[Tensor]:
        """Frozen parameters in full and in the space's precision (collective where they are sharded)."""
        out = []
        for source in sources:
            p = self.backend.full_parameter(self.frozen[source - self.trainable]).detach()
            out.append(p.to(self.dtype) if p.is_floating_point() else p)
        return out

    def fill(self, places: Sequence[Place], weights: Sequence[Tensor] | Mapping[int, Tensor]) -> None:
        """Put weights, by source, where they belong; the tensors themselves, so autograd sees them."""
        for place in places:
            owner: Any = place.owner
            owner._parameters[place.name] = weights[place.source]

    def clear(self, places: Sequence[Place]) -> None:
        """Let go of the weights."""
        self.fill(places, self._empty)

    def blocks(self) -> tuple[list[Block], Block]:
        """What is gathered part by part: the items of module lists (a transformer's layers), and outside of them each
        module that owns weights itself. And the root's own weights, which no part holds.
        """
        parts, taken = [], set()
        for module in dict.fromkeys(_parts(self.module)):
            inside = set(module.modules())
            parts.append(Block(module, tuple(p for p in self.places if p.owner in inside)))
            taken |= inside
        rest = Block(self.module, tuple(p for p in self.places if p.owner not in taken))
        return [b for b in parts if b.places], rest


@dataclass(frozen=True)
class Block:
    """A module and the places of the weights in it."""

    module: nn.Module
    places: tuple[Place, ...]

    def sources(self, trainable: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The trainable and the frozen parameters in it, each once."""
        every = sorted({p.source for p in self.places})
        return tuple(s for s in every if s < trainable), tuple(s for s in every if s >= trainable)


def _parts(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        layer = isinstance(module, nn.ModuleList) and not isinstance(child, nn.ModuleList)
        if isinstance(child, nn.ParameterList | nn.ParameterDict):
            continue  # it has no forward: its weights are the root's
        if layer or any(p is not None for p in child._parameters.values()):
            yield child
        else:
            yield from _parts(child)
