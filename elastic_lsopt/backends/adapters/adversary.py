"""The adapter called "adversary" of a model whose layers peft has adapted twice.

    y = x W^T + s x A^T B^T + s x A2^T B2^T           …q_proj.lora_A.adversary.weight, …q_proj.lora_B.adversary.weight

Read off peft's layers by their attributes: nothing here imports it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from elastic_lsopt.backends.backend import Backend
from elastic_lsopt.errors import Unsupported, UserError
from elastic_lsopt.space.layout import plain_name

ADVERSARY = "adversary"
"""What the adapter is called in peft's layers."""
HOLDERS = ("lora_A", "lora_B")
"""Where a layer keeps the two factors of each adapter."""
LINEAR = {"Linear", "Conv1D"}
"""Layers whose adapter is a plain product of two matrices."""


def is_factor(name: str, adapter: str) -> bool:
    """Whether a parameter of that name is one of the two matrices of an adapter's product."""
    return any(f".{holder}.{adapter}." in name for holder in HOLDERS)


@dataclass(frozen=True)
class Product:
    """The numbers of A2 and B2 of one layer among the parameters, and the s by which their product is multiplied."""

    a: int
    b: int
    scale: float


class AdversaryAdapter:
    """That of a backend's model: what `space.adversary` is.

    Raises UserError for a model without, and where it is frozen, not active, or all that is trained; Unsupported for
    what is no plain product beside a linear layer.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        backend.drop_gathered()  # FSDP2 hides the shards of a gathered group
        number = {id(backend.parameters[p.name]): i for i, p in enumerate(backend.layout.parameters)}
        self._products = [*_products(backend.module, number)]
        own = {i for product in self._products for i in (product.a, product.b)}
        parameters = backend.layout.parameters
        self.factors = tuple(i in own for i in range(len(parameters)))
        self.ranks = frozenset(parameters[product.a].shape[0] for product in self._products)
        if all(self.factors):
            raise UserError(
                f"nothing is trained beside the adapter {ADVERSARY!r}; make another one trainable: of peft's layers "
                f"layer.set_adapter(['default', {ADVERSARY!r}])."
            )

    def norm(self) -> float:
        # ||B A||_F^2 = tr((B^T B)(A A^T)): two r x r matrices, and never the product, which has the size of W.
        factors, device = self._wholes(), self._backend.compute_device
        total = torch.zeros((), dtype=torch.float64, device=device)
        for product in self._products:
            a, b = factors[product.a].double(), factors[product.b].double()
            total += product.scale**2 * ((b.T @ b) * (a @ a.T)).sum()
        return total.clamp(min=0).sqrt().item()

    def _wholes(self) -> dict[int, Tensor]:
        """Its factors, whole, by their numbers (collective)."""
        backend = self._backend
        wanted = [i for i, is_factor in enumerate(self.factors) if is_factor]
        own = [backend.masters[i].detach() for i in backend.own(wanted)]
        wide = torch.float64 if any(t.dtype == torch.float64 for t in backend.masters) else torch.float32
        wholes = backend.all_gather([t.to(wide) for t in own], wanted, wide)
        return dict(zip(wanted, wholes, strict=True))


def _products(module: nn.Module | None, number: dict[int, int]) -> Iterator[Product]:
    """Of every layer that has it, by the parameters' numbers."""
    found = False
    modules = module.named_modules() if module is not None else ()
    for name, layer in ((plain_name(wrapped), layer) for wrapped, layer in modules):
        if isinstance(layer, nn.ModuleDict | nn.ParameterDict):
            if ADVERSARY in layer and name.rpartition(".")[2] not in (*HOLDERS, "lora_dropout"):
                raise Unsupported(
                    f"the adapter {ADVERSARY!r} has {name}, which is no factor of a product beside a linear layer; "
                    "give it target_modules of linear layers alone, and no modules_to_save."
                )
            continue
        if ADVERSARY not in getattr(layer, "lora_A", ()):
            continue
        found = True
        yield _product(name, layer, number)
    if not found:
        raise UserError(
            f"the model has no adapter called {ADVERSARY!r}, which is to move its weights: a job's lora block makes "
            f"it; in Python peft.inject_adapter_in_model(config, model, {ADVERSARY!r}), then of each of its layers "
            f"layer.set_adapter(['default', {ADVERSARY!r}])."
        )


def _product(name: str, layer: Any, number: dict[int, int]) -> Product:
    if not LINEAR & {c.__name__ for c in type(layer.base_layer).__mro__} or layer.use_dora.get(ADVERSARY, False):
        what = "DoRA" if layer.use_dora.get(ADVERSARY, False) else f"a {type(layer.base_layer).__name__}"
        raise Unsupported(
            f"layer {name} is {what}: an {ADVERSARY} is tested as plain LoRA on linear layers; leave it out."
        )
    a, b = layer.lora_A[ADVERSARY], layer.lora_B[ADVERSARY]
    if b.bias is not None:
        raise Unsupported(f"layer {name} has lora_bias: an {ADVERSARY} is a product of two matrices; leave it out.")
    if id(a.weight) not in number or id(b.weight) not in number or ADVERSARY not in layer.active_adapters:
        raise UserError(
            f"the adapter {ADVERSARY!r} of layer {name} is not trained; call "
            f"layer.set_adapter(['default', {ADVERSARY!r}]) before the optimizer is built with its parameters too."
        )
    return Product(number[id(a.weight)], number[id(b.weight)], float(layer.scaling[ADVERSARY]))
