"""Buffers that a forward moves (the running statistics of batch norm) and that only a step's first pass may move.

SAM's second pass sees the batch again, at weights that are not the model's: its statistics must not count. The authors
of SAM and ASAM leave them out too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def moving_buffers(roots: Sequence[nn.Module]) -> dict[str, Tensor]:
    """The buffers of modules in training mode by name, as a forward may move them (copies)."""
    owners = ((name, m) for root in roots for name, m in root.named_modules() if m.training)
    found = ((f"{owner}.{name}".lstrip("."), b) for owner, m in owners for name, b in m._buffers.items())
    return {name: b.clone() for name, b in found if b is not None}


@contextmanager
def still_buffers(roots: Sequence[nn.Module]) -> Iterator[None]:
    """Inside, forwards may move the buffers of modules in training mode; afterwards they are as they were.

    Memory: those buffers once more.
    """
    owners = dict.fromkeys(m for root in roots for m in root.modules() if m.training)
    kept = [(m, name, b, b.clone()) for m in owners for name, b in m._buffers.items() if b is not None]
    try:
        yield
    finally:
        with torch.no_grad():
            for owner, name, buffer, value in kept:
                buffer.copy_(value)
                owner._buffers[name] = buffer  # a forward may have put another tensor in its place
