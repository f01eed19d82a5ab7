"""Adapted layers whose merged weight W + s B A carries noise, while only A and B are trained.

    y = x (W + E)^T + b + s x A^T B^T          E_ij = std(n) ||W_i + s (B A)_i|| z_ij

W is never written: E is drawn again from its seed in each forward and each backward, beside the one layer that runs,
so W comes back to the bit by never having left, on any backend and under recomputed activations. What is kept for a
step is a number per row, and until the first forward the adapters, whole on each rank; there is no noise of the model's
size, and no gradient of W.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from elastic_lsopt.backends.backend import Backend
from elastic_lsopt.errors import Unsupported, UserError
from elastic_lsopt.space.random.noise import add_normal_, block_seed

CHUNK = 1 << 22
"""Elements of W that are added to their product at once, for the norms of its rows."""


@dataclass
class Noise:
    """E of one layer in one draw; `rows` are made in the first forward, where W is whole, and then `factors` are let
    go of."""

    seed: int
    name: str
    std: float
    factors: tuple[Tensor, Tensor, float] | None
    rows: Tensor | None = None

    @torch.no_grad()
    def added_to(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """W + E as `dtype`, through fp32 (fp64 for an fp64 W)."""
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        if self.rows is None:
            self.rows = self.std * self._row_norms(weight, wide)
        out = weight.to(wide, copy=True, memory_format=torch.contiguous_format)
        self._add_to(out, self.rows)
        return out.to(dtype)

    def _add_to(self, out: Tensor, rows: Tensor) -> None:
        add_normal_(out.view(-1), seed=self.seed, name=self.name, offset=0, scale=rows, row_length=out.shape[1])

    def _row_norms(self, weight: Tensor, wide: torch.dtype) -> Tensor:
        assert self.factors is not None
        b, a, scale = self.factors
        step = max(1, CHUNK // weight.shape[1])
        parts = [
            torch.addmm(w.to(wide), rows.to(wide), a.to(wide), alpha=scale).norm(dim=1)
            for w, rows in zip(weight.split(step), b.split(step), strict=True)
        ]
        self.factors = None
        return torch.cat(parts)


class _Linear(torch.autograd.Function):
    """x (W + E)^T, whose derivative by x draws E again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, noise: Noise) -> Tensor:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        ctx.save_for_backward(weight)
        ctx.noise, ctx.given = noise, x.dtype
        with torch.autocast(kind, enabled=False):
            return (x.to(dtype) if dtype != weight.dtype else x) @ noise.added_to(weight, dtype).T

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        [g], [weight] = gradients, ctx.saved_tensors
        return (g @ ctx.noise.added_to(weight, g.dtype)).to(ctx.given), None, None


@dataclass
class AdaptedLayer:
    """In place of the `forward` of an adapted layer's own linear layer."""

    name: str
    base: nn.Linear
    a: str
    b: str
    scale: float
    plain: Callable[[Tensor], Tensor]
    noise: Noise | None = field(default=None)

    def take_place(self) -> None:
        vars(self.base)["forward"] = self

    def __call__(self, x: Tensor) -> Tensor:
        if self.noise is None:
            return self.plain(x)
        y: Any = _Linear.apply(x, self.base.weight, self.noise)
        return y if self.base.bias is None else y + self.base.bias.to(y.dtype)


class MergedWeights:
    """The adapted layers of a backend's model. Raises UserError for a model without, Unsupported for layers that are
    not linear or have several adapters."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        module = backend.module
        self._layers = [*adapted_layers(module)] if module is not None else []
        if not self._layers:
            raise UserError("the model has no layer with an adapter, so there are no merged weights to move: add lora.")
        self._number = {p.name: i for i, p in enumerate(backend.layout.parameters)}
        for layer in self._layers:
            layer.take_place()

    @contextmanager
    def noised(self, seed: int, step: int, draw: int, std: Callable[[int], float]) -> Iterator[None]:
        factors = self._factors()
        for layer in self._layers:
            n = factors[layer.a].shape[1]
            product = factors[layer.b], factors[layer.a], layer.scale
            layer.noise = Noise(block_seed(seed, step, draw), f"{layer.name}.weight", std(n), product)
        del factors
        try:
            yield
        finally:
            for layer in self._layers:
                layer.noise = None

    def _factors(self) -> dict[str, Tensor]:
        """A and B of every layer, whole (collective)."""
        backend = self._backend
        wanted = sorted(self._number[name] for layer in self._layers for name in (layer.a, layer.b))
        own = [backend.masters[i].detach() for i in backend.own(wanted)]
        dtype = own[0].dtype if own else torch.float32
        wholes = backend.all_gather(own, wanted, dtype)
        return {backend.layout.parameters[i].name: t for i, t in zip(wanted, wholes, strict=True)}


def adapted_layers(module: nn.Module) -> Iterator[AdaptedLayer]:
    """The layers of a model that have an adapter, in its order. Raises Unsupported as `MergedWeights` does."""
    for name, layer in module.named_modules():
        adapters = [*getattr(layer, "lora_A", ())]
        if not adapters:
            continue
        base: Any = layer.base_layer
        if len(adapters) > 1 or not isinstance(base, nn.Linear):
            what = f"{len(adapters)} adapters" if len(adapters) > 1 else f"a {type(base).__name__} under its adapter"
            raise Unsupported(
                f"layer {name} has {what}: merged weights are moved in torch.nn.Linear with one adapter; leave it out "
                "of target_modules, or set landscape_space: trained."
            )
        if isinstance(base.forward, AdaptedLayer):  # of another step on this model
            yield base.forward
            continue
        yield AdaptedLayer(
            name=name, base=base, a=f"{name}.lora_A.{adapters[0]}.weight", b=f"{name}.lora_B.{adapters[0]}.weight",
            scale=float(layer.scaling[adapters[0]]), plain=base.forward,  # type: ignore[index]
        )  # fmt: skip
