"""torch 2.14 and later: one default group that lives on, and takes other members by our agents' decision.

gloo's own abort frees nobody who waits for a silent peer (measured with torch 2.14.1), so sockets are cut as before.
"""

from __future__ import annotations

import secrets
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from elastic_lsopt.backends.fabric.gloo import Gloo

UUID_BITS = 62


class Reconfigured(Gloo):
    """CPU tensors; experimental in torch, and so asked for by what it needs, not by a version."""

    name = "gloo, reconfigured"

    @staticmethod
    def supported() -> bool:
        return all(hasattr(dist, name) for name in ("_reconfigure", "_get_reconfigure_handle"))

    def form(self, store: dist.Store, rank: int, size: int, timeout: timedelta) -> None:
        api: Any = dist
        if not dist.is_initialized():
            dist.init_process_group(
                self.backend, store=dist.PrefixStore("group", store), rank=rank, world_size=size, timeout=timeout,
                enable_reconfigure=True,  # pyright: ignore[reportCallIssue]
            )  # fmt: skip
        if rank == 0:
            store.set("uuid", str(secrets.randbits(UUID_BITS)))
        store.set(f"handle/{rank}", api._get_reconfigure_handle())
        handles = [store.get(f"handle/{r}").decode() for r in range(size)]
        api._reconfigure(uuid=int(store.get("uuid")), handles=handles, timeout=timeout).wait()
