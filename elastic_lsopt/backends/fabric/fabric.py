"""What the runtime needs of a communication library.

form     the default process group of a generation
group    the same ranks in a group of their own, on the host
cut      from any thread: this process's collectives raise at once, and its peers' by that
error    what the library says went wrong
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from datetime import timedelta

import torch.distributed as dist


class Fabric(ABC):
    """A communicator made and broken; of one process, which is in one generation at a time."""

    name: str

    @abstractmethod
    def form(self, store: dist.Store, rank: int, size: int, timeout: timedelta) -> None:
        """The default process group (collective); `store` is one that no other group has used."""

    @abstractmethod
    def cut(self, ports: Collection[int], keep: int) -> None:
        """Break every collective that this process waits in, or will; connections of port `keep` stay. Any thread."""

    def group(self, timeout: timedelta) -> dist.ProcessGroup:
        """All ranks once more, in a gloo group (collective)."""
        group = dist.new_group(backend="gloo", timeout=timeout)
        assert isinstance(group, dist.ProcessGroup)
        return group

    def error(self) -> str:
        """The library's own word on what broke; "" where it keeps none."""
        return ""
