"""NCCL, with gloo beside it on the host.

[Note: how NCCL is broken] A kernel that waits for a dead peer waits for ever, and so does the host that waits for it.
`abort` of every communicator, from another thread than the one that waits, ends both. It must find communicators that
do not block (`config.blocking = 0`) and no watchdog that would end the process first: both are settings of the process,
made before the first group. For torch 2.14 and later there is `ReconfiguredNCCL`.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from contextlib import suppress
from datetime import timedelta

import torch
import torch.distributed as dist

from elastic_lsopt.backends.fabric.gloo import Gloo

SETTINGS = {
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",  # nobody but us aborts, and nobody ends the process
    "TORCH_NCCL_ENABLE_MONITORING": "0",
    "TORCH_NCCL_NONBLOCKING_TIMEOUT": "60",
}


class NCCL(Gloo):
    """CUDA tensors by NCCL, CPU tensors by gloo."""

    name = "nccl"
    backend = "cpu:gloo,cuda:nccl"

    def form(self, store: dist.Store, rank: int, size: int, timeout: timedelta) -> None:
        for key, value in SETTINGS.items():
            os.environ.setdefault(key, value)
        options = dist.ProcessGroupNCCL.Options()
        options.config.blocking = 0  # pyright: ignore[reportAttributeAccessIssue]
        dist.init_process_group(
            self.backend, store=store, rank=rank, world_size=size, timeout=timeout, pg_options=options,
            device_id=torch.device("cuda", torch.cuda.current_device()),
        )  # fmt: skip

    def cut(self, ports: Collection[int], keep: int) -> None:
        super().cut(ports, keep)
        for backend in self._backends():
            with suppress(RuntimeError):  # one that was never used has no communicator
                backend.abort()  # pyright: ignore[reportAttributeAccessIssue]

    def error(self) -> str:
        for backend in self._backends():
            ask = getattr(backend, "get_error", None)
            if ask is not None and "SUCCESS" not in (said := str(ask())):
                return said
        return ""

    def _backends(self) -> list[dist.distributed_c10d.Backend]:
        found = []
        for group in list(dist.distributed_c10d._world.pg_map):
            with suppress(RuntimeError):
                found.append(group._get_backend(torch.device("cuda")))
        return found
