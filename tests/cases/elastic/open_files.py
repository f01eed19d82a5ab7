"""Connections that a rank opens for its process groups, counted."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Any

import torch
import torch.distributed as dist

import elastic_lsopt as lso
from tests.cases import engines


def sockets() -> int:
    """Open sockets of this process."""
    found = 0
    for fd in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            found += os.readlink(f"/proc/self/fd/{fd}").startswith("socket:")
    return found


def count(kind: str) -> dict[str, Any]:
    """Sockets of two gloo groups that have talked, and those that an engine of `kind` opens with its first step."""
    before = sockets()
    for _ in range(2):
        dist.all_reduce(torch.zeros(1), group=dist.new_group(backend="gloo"))
    of_two_groups = sockets() - before
    before = sockets()
    engine = engines.build(kind, engines.net(), lso.SAM(rho=0.1))
    [batches] = engines.batches(1, 2)
    engine.train_batch(engines.mine(batches))
    return {"two_groups": of_two_groups, "engine": sockets() - before}
