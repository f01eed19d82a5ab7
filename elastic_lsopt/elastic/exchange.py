"""Small values between all ranks: JSON, compressed, never a pickle."""

from __future__ import annotations

import json
import zlib
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def gather_json(group: dist.ProcessGroup, value: Any) -> list[Any]:
    """Every rank's `value` (JSON), in the group's order, on every rank (collective, two gathers; a gloo group).

    Raises TypeError where `value` is not JSON, before any communication.
    """
    own = zlib.compress(json.dumps(value, separators=(",", ":")).encode(), 1)
    sizes = [int(size) for size in _gather(group, torch.tensor([len(own)]))]
    padded = torch.zeros(max(sizes), dtype=torch.uint8)
    padded[: len(own)] = torch.frombuffer(bytearray(own), dtype=torch.uint8)
    texts = _gather(group, padded)
    return [json.loads(zlib.decompress(t[:n].numpy().tobytes())) for t, n in zip(texts, sizes, strict=True)]


def _gather(group: dist.ProcessGroup, own: Tensor) -> list[Tensor]:
    out = [torch.empty_like(own) for _ in range(group.size())]
    group.allgather([out], [own]).wait()
    return out
