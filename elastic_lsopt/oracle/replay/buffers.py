"""Buffers that a forward moves (the running statistics of batch norm) and that only a step's first pass may move.

SAM's second pass sees the batch again, at weights that are not the model's: its statistics must not count. The authors
of SAM and ASAM leave them out too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn


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
