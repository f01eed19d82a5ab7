"""What an engine keeps and sends, counted while it works, for the estimates of `elastic-lsopt plan`."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.plan_memory import engine_of, held, job
from tests.cases import engines

SMALL = 400
"""Bytes below which a collective is a loss, a norm or a vote."""


class Collectives(TorchDispatchMode):
    """Bytes that this rank sends in a ring, by kind: the largest tensor of a collective is the whole of it."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            whole = max((t.nbytes for t in tree_leaves(args) if isinstance(t, Tensor)), default=0)
            share = (dist.get_world_size() - 1) / dist.get_world_size()
            if whole >= SMALL:
                kind = "weights" if "gather" in str(func) else "gradients"
                self.sent[kind] += round(whole * share * (2 if "allreduce" in str(func) else 1))
        return func(*args, **(kwargs or {}))


def kept_and_sent(settings: dict[str, Any]) -> dict[str, dict[str, int]]:
    """Bytes that the engine of a small job keeps after a step, and sends in one (collective)."""
    with tempfile.TemporaryDirectory() as folder:
        engine, units = engine_of(job(settings, Path(folder), toy=True))
        engine.train_batch(units)
        engine.train_batch(units)
        with Collectives() as seen:
            engine.train_batch(units)
        found = {"kept": held(engine), "sent": dict(seen.sent)}
        engines.close(engine)
        return found
