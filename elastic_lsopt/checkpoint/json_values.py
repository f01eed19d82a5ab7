"""What is saved and is no tensor by pieces: step counters, learning rates, betas. JSON, exact, typed.

A tensor of one element becomes {"$tensor": …}, a tuple {"$tuple": …}; plain values are themselves.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from elastic_lsopt.checkpoint.safetensors_file import BY_NAME, DTYPES
from elastic_lsopt.errors import Unsupported

ELEMENTS = "$elements"
"""Marks a value that is saved element by element, as tensors: {"$elements": true}."""


def encode(value: Any, what: str) -> Any:
    """`value` as JSON. Raises Unsupported, naming `what`, for all but numbers, strings, lists, one-element tensors."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor) and value.numel() == 1:
        value = getattr(value, "_local_tensor", value)
        return {
            "$tensor": value.item(), "dtype": DTYPES[value.dtype], "shape": list(value.shape),
            "device": value.device.type != "cpu",
        }  # fmt: skip
    if isinstance(value, tuple):
        return {"$tuple": [encode(v, what) for v in value]}
    if isinstance(value, list):
        return [encode(v, what) for v in value]
    found = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
    raise Unsupported(
        f"{what} is {found}: a checkpoint holds state of the parameter's own shape and single numbers; "
        "use an optimizer whose state is element by element (AdamW, SGD, …)."
    )


def decode(value: Any, device: torch.device) -> Any:
    """The value that `encode` was given; a tensor that lay on an accelerator is made on `device`."""
    if isinstance(value, list):
        return [decode(v, device) for v in value]
    if isinstance(value, dict) and "$tuple" in value:
        return tuple(decode(v, device) for v in value["$tuple"])
    if isinstance(value, dict) and "$tensor" in value:
        where = device if value["device"] else "cpu"
        return torch.full(value["shape"], value["$tensor"], dtype=BY_NAME[value["dtype"]], device=where)
    return value


def number(value: Any) -> float:
    """The number in an encoded scalar, to fill an element-wise tensor or to compare two; 0 for anything else."""
    value = value["$tensor"] if isinstance(value, dict) and "$tensor" in value else value
    return float(value) if isinstance(value, bool | int | float) else 0.0
