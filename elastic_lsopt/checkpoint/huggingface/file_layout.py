"""Which tensor of a Hugging Face folder holds which elements of which parameter.

A folder may call a parameter otherwise than the module does (`block_sparse_moe` for `mlp`, `bert.` before everything or
not), and may keep the experts of a layer apart that the module holds as one tensor:

    layers.0.block_sparse_moe.experts.2.w1.weight  =  elements [2 r, 2 r + n) of layers.0.mlp.experts.gate_up_proj

transformers converts whole tensors. Here its conversion for saving runs once on tensors without memory: what it cuts
out of a parameter are views, and a view knows where it begins. Read backwards, the same table says what to read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


@dataclass(frozen=True)
class Range:
    """Elements [offset, offset + numel) of the flattened parameter or buffer `name`, which a file shapes as `shape`."""

    name: str
    offset: int
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return prod(self.shape)


class _Views(TorchFunctionMode):
    """Inside, a copy is its original: so that what a conversion returns still lies in the tensor that it was given."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.contiguous, Tensor.clone):
            return args[0]
        return func(*args, **(kwargs or {}))


def layout_to_save(model: Any, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Range]:
    """The tensors that transformers would save of a model whose parameters and buffers have these whole shapes, by key.

    Where its conversion does more than cut (it transposes, permutes), that parameter is under its own name, whole:
    transformers reads that too. No memory, no communication.
    """
    from transformers.core_model_loading import revert_weight_conversion

    whole = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    name_of = {tensor.untyped_storage()._cdata: name for name, tensor in whole.items()}
    with _Views():
        saved = revert_weight_conversion(model, dict(whole))
    cut: dict[str, dict[str, Range]] = {name: {} for name in shapes}
    torn: set[str] = set()
    for key, tensor in saved.items():
        name = name_of.get(tensor.untyped_storage()._cdata)
        if name is not None and tensor.is_contiguous():
            cut[name][key] = Range(name, int(tensor.storage_offset()), tuple(tensor.shape))
        elif name is not None:
            torn.add(name)
    out: dict[str, Range] = {}
    for name, shape in shapes.items():
        ranges = cut[name]
        if name in torn or sum(r.numel for r in ranges.values()) != prod(shape):
            ranges = {name: Range(name, 0, shape)}
        out |= ranges
    return out


def layout_of_files(
    model: Any, shapes: Mapping[str, tuple[int, ...]], found: Iterable[str]
) -> tuple[dict[str, Range], list[str]]:
    """What each tensor of a folder should be of the model, and the keys of those that are nothing of it.

    `shapes` are the whole shapes of the model's parameters and buffers under every name that they have, `found` the
    keys in the folder's files. Raises LookupError where experts are kept in a way that cannot be read in ranges.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [m for m in mapping if isinstance(m, WeightRenaming)]
    converters = [m for m in mapping if isinstance(m, WeightConverter)]
    known: dict[str, Any] = dict.fromkeys(shapes, True)

    def renamed(keys: Iterable[str]) -> dict[tuple[str, str | None], list[str]]:
        """Keys in transformers' order, by what they become; of a fused parameter the experts one after the other."""
        out: dict[tuple[str, str | None], list[str]] = {}
        for key in sorted(keys, key=dot_natural_key):
            place = rename_source_key(key, renamings, converters, model.base_model_prefix, known)
            out.setdefault(place, []).append(key)
        return out

    saved = layout_to_save(model, shapes)
    usual = renamed(saved)
    layout: dict[str, Range] = {}
    unused: list[str] = []
    for (name, pattern), keys in renamed(found).items():
        if pattern is None:
            for key in keys:
                if name in shapes:
                    layout[key] = Range(name, 0, shapes[name])
                else:
                    unused.append(key)
            continue
        places = usual.get((name, pattern))
        if places is None or len(places) != len(keys) or any(saved[p].name == p for p in places):
            if not any(of.startswith(name.rpartition(".")[0]) for of in shapes):
                unused += keys
                continue
            raise LookupError(f"{keys[0]} is kept otherwise than the model holds it ({pattern})")
        for key, place in zip(keys, places, strict=True):
            layout[key] = saved[place]
    return layout, unused
