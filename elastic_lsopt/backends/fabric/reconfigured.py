"""torch 2.14 and later: one default group that lives on, and takes other members by our agents' decision.

gloo's own abort frees nobody who waits for a silent peer (measured with torch 2.14.1), so sockets are cut as before;
nccl2's, in a group that can be reconfigured, revokes what runs and leaves the group as it is. The interface is
experimental in torch, and so asked for by what it needs, not by a version.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from elastic_lsopt.backends.fabric.gloo import Gloo
from elastic_lsopt.backends.fabric.nccl import NCCL

UUID_BITS = 62


class Reconfigured(Gloo):
    """CPU tensors."""

    name = "gloo, reconfigured"

    @staticmethod
    def supported() -> bool:
        return all(hasattr(dist, name) for name in ("_reconfigure", "_get_reconfigure_handle"))

    def form(self, store: dist.Store, rank: int, size: int, timeout: timedelta) -> None:
        _take_members(["cpu"], self.backend, store, rank, size, timeout)


class ReconfiguredNCCL(NCCL):
    """CUDA tensors by nccl2, CPU tensors by gloo."""

    name = "nccl2, reconfigured"
    backend = "cpu:gloo,cuda:nccl2"

    @staticmethod
    def supported() -> bool:
        return Reconfigured.supported() and hasattr(dist, "ProcessGroupNCCL2")

    def form(self, store: dist.Store, rank: int, size: int, timeout: timedelta) -> None:
        device = torch.device("cuda", torch.cuda.current_device())
        _take_members(["cpu", "cuda"], self.backend, store, rank, size, timeout, device_id=device)


def _take_members(
    devices: Sequence[str], backend: str, store: dist.Store, rank: int, size: int, timeout: timedelta, **options: Any
) -> None:
    """Make the default group if there is none, and give each of its libraries these members (collective)."""
    from torch._C._distributed_c10d import ReconfigureOptions  # pyright: ignore[reportAttributeAccessIssue]

    if not dist.is_initialized():
        dist.init_process_group(
            backend, store=dist.PrefixStore("group", store), rank=rank, world_size=size, timeout=timeout,
            enable_reconfigure=True, **options,  # pyright: ignore[reportCallIssue]
        )  # fmt: skip
    if rank == 0:
        store.set("uuid", str(secrets.randbits(UUID_BITS)))
    group = dist.distributed_c10d._get_default_group()
    for device in devices:
        library: Any = group._get_backend(torch.device(device))
        store.set(f"{device}/{rank}", library.get_reconfigure_handle())
        members = ReconfigureOptions()
        members.uuid = int(store.get("uuid"))
        members.handles = [store.get(f"{device}/{r}").decode() for r in range(size)]
        members.timeout = timeout
        library.reconfigure(members).wait()
