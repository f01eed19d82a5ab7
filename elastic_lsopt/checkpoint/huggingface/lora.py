"""What of a model with LoRA adapters is whose: the layers' products, and the names that the plain model has.

    here                                              in the plain model            in peft's adapter file
    …q_proj.base_layer.weight                         …q_proj.weight
    …q_proj.lora_A.default.weight                     none: s B A is added          …q_proj.lora_A.weight
    …q_proj.lora_A.adversary.weight                   none                          none: bi_lora's, for training
    score.original_module.weight                      none
    score.modules_to_save.default.weight              score.weight                  score.weight

Read off peft's layers by their attributes: nothing here imports it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from elastic_lsopt.backends.adapters.adversary import ADVERSARY, is_factor
from elastic_lsopt.backends.backend import Backend
from elastic_lsopt.checkpoint.huggingface.drawn_weights import DrawnWeights
from elastic_lsopt.checkpoint.huggingface.weights import Weights
from elastic_lsopt.errors import Unsupported

WRAPPED = "base_model.model."
"""How names begin in a PeftModel, and in every adapter file."""


@dataclass(frozen=True)
class Product:
    """What an adapted layer adds to its frozen `weight`: scale * B A, transposed where the weight is."""

    weight: str
    a: str
    b: str
    scale: float
    transposed: bool


def adapter_of(module: nn.Module) -> str | None:
    """The name of the model's adapter, None for a model without; beside another one bi_lora's adversary is none.

    Raises Unsupported for what is not one plain LoRA adapter.
    """
    configs: dict[str, Any] | None = getattr(module, "peft_config", None)
    if not configs:
        return None
    name, *others = [n for n in configs if n != ADVERSARY] or configs
    config = configs[name]
    kind = getattr(config.peft_type, "value", config.peft_type)
    odd = ("use_dora", "lora_bias", "trainable_token_indices", "target_parameters")
    what = [key for key in odd if getattr(config, key, None)]
    what += [f"{kind} adapters"] if kind != "LORA" else []
    what += [f"bias={config.bias}"] if getattr(config, "bias", "none") != "none" else []
    what += ["several adapters"] if others else []
    if what:
        raise Unsupported(
            f"exporting a PEFT model with {' and '.join(what)} is not tested, one LoRA adapter of plain products is; "
            "call merge_and_unload() and export what it gives."
        )
    return name


def products(module: nn.Module, adapter: str) -> list[Product]:
    """Of every adapted layer, in the model's order. Raises Unsupported for a layer that is not linear."""
    out = []
    for name, layer in module.named_modules():
        if adapter not in getattr(layer, "lora_A", ()):
            continue
        base: Any = layer.base_layer
        if not {"Linear", "Conv1D"} & {c.__name__ for c in type(base).__mro__}:
            raise Unsupported(
                f"layer {name} is a {type(base).__name__}: LoRA is tested on linear layers; leave it out."
            )
        parts = (f"{name}.base_layer.weight", f"{name}.lora_A.{adapter}.weight", f"{name}.lora_B.{adapter}.weight")
        out.append(Product(*parts, float(layer.scaling[adapter]), bool(layer.fan_in_fan_out)))  # type: ignore[index]
    return out


def name_without(name: str, adapter: str) -> str | None:
    """What the plain model calls it; None for what it has not."""
    name = name.removeprefix(WRAPPED)
    if is_factor(name, adapter) or is_factor(name, ADVERSARY) or ".original_module." in name:
        return None
    return name.replace(".base_layer.", ".").replace(f".modules_to_save.{adapter}.", ".")


def adapter_name(name: str, adapter: str) -> str:
    """What peft's adapter file calls a trained parameter."""
    for part in ("lora_A", "lora_B"):
        name = name.replace(f".{part}.{adapter}.", f".{part}.")
    return WRAPPED + name.removeprefix(WRAPPED).replace(f".modules_to_save.{adapter}.", ".")


def gathered(backend: Backend, names: Sequence[str], points: Sequence[Tensor]) -> dict[str, Tensor]:
    """These trained parameters whole, in fp32 (or fp64), from this rank's `points` of all of them (collective)."""
    number = {p.name: i for i, p in enumerate(backend.layout.parameters)}
    wanted = sorted(number[name] for name in names)
    own = [points[i].detach() for i in backend.own(wanted)]
    wide = torch.float64 if any(t.dtype == torch.float64 for t in backend.masters) else torch.float32
    wholes = backend.all_gather([t.to(wide) for t in own], wanted, wide)
    return {backend.layout.parameters[i].name: t for i, t in zip(wanted, wholes, strict=True)}


def merged(part: Tensor, offset: int, product: Product, factors: dict[str, Tensor]) -> Tensor:
    """Elements [offset, offset + part.numel()) of W + s B A, flattened, not rounded: memory for their rows."""
    a, b = factors[product.a], factors[product.b]
    left, right = (a.T, b.T) if product.transposed else (b, a)
    columns, end = right.shape[1], offset + part.numel()
    first, last = offset // columns, -(-end // columns)
    rows = (left[first:last] @ right).view(-1) * product.scale
    return part.to(rows.device, rows.dtype) + rows[offset - first * columns : end - first * columns]


class AdaptedWeights:
    """First weights of a model with adapters: the plain model's, and the adapters' as peft draws them, in ranges.

    `model` has its adapters and no memory; `plain` are the weights by the names that it had before.
    """

    def __init__(self, model: Any, plain: Weights, seed: int) -> None:
        self._plain = plain
        self._adapter = adapter_of(model) or ""

        def initialise() -> None:
            for layer in model.modules():
                for adapter in getattr(layer, "lora_A", ()):
                    layer.reset_lora_parameters(adapter, True)

        self._own = DrawnWeights(model, seed, initialise)

    def holds(self, name: str) -> bool:
        return self._own.holds(name) or self._plain.holds(self._name(name))

    def copy_to(self, target: Tensor, name: str, offset: int) -> None:
        if self._own.holds(name):
            self._own.copy_to(target, name, offset)
        else:
            self._plain.copy_to(target, self._name(name), offset)

    def _name(self, name: str) -> str:
        """A head that is trained whole begins as the one that it stands for."""
        return name_without(name, self._adapter) or name.replace(".original_module.", ".")
