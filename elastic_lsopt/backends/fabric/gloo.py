"""gloo: TCP connections of this process, which can be shut down.

Neither `abort()` nor `destroy_process_group()` closes them while a framework holds the group, and gloo waits for a
silent peer until the group's timeout. A closed socket it notices at once.
"""

from __future__ import annotations

from collections.abc import Collection
from datetime import timedelta

import torch.distributed as dist

from elastic_lsopt.backends.fabric.fabric import Fabric
from elastic_lsopt.backends.fabric.sockets import shut_down


class Gloo(Fabric):
    """CPU tensors, any torch."""

    name = "gloo"
    backend = "gloo"

    def form(self, store: dist.Store, rank: int, size: int, timeout: timedelta) -> None:
        dist.init_process_group(self.backend, store=store, rank=rank, world_size=size, timeout=timeout)

    def cut(self, ports: Collection[int], keep: int) -> None:
        shut_down(ports, keep=keep)
