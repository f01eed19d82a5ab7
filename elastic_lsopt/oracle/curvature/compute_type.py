"""The type in which a forward really computes: autocast may be entered anywhere, also inside a closure or a loss."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from elastic_lsopt.errors import UserError
from elastic_lsopt.oracle.gradient_engine import GradientEngine

FP16 = (
    "fp16 needs loss scaling (GradScaler), which is refused: one scale cannot serve two passes, and the base would "
    "step with a scaled gradient; use bf16, whose autocast needs no scaler."
)


@contextmanager
def observed(backend: GradientEngine) -> Iterator[None]:
    """Inside, forwards tell the type that autocast gives their weights; it becomes the backend's `compute_dtype`.

    Does nothing once a forward has told. Raises UserError where the type is fp16. Seen are the autocast context around
    this one and, through hooks that are gone afterwards, those around each layer of `backend.roots`.
    """
    if backend.observed or backend.compute_dtype == torch.float64:  # which autocast leaves alone
        yield
        return
    kind, seen = backend.compute_device.type, set[torch.dtype]()

    def note(*_: Any) -> None:
        if torch.is_autocast_enabled(kind):
            seen.add(torch.get_autocast_dtype(kind))

    note()
    layers = dict.fromkeys(m for root in backend.roots for m in root.modules() if m is root or _holds_weights(m))
    hooks = [m.register_forward_pre_hook(note) for m in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    backend.observed = True
    backend.compute_dtype = min((backend.compute_dtype, *seen), key=lambda dtype: dtype.itemsize)
    if torch.float16 in (backend.compute_dtype, *seen):
        raise UserError(FP16)


def _holds_weights(module: nn.Module) -> bool:
    return any(p is not None for p in module._parameters.values())
