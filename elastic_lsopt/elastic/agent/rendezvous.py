"""`torchrun --rdzv-backend=lsopt`: each torchrun agent gets a rendezvous of its own, of one.

torchelastic stops all workers of all nodes whenever a node comes or goes. Here that is the business of our own node
agents, so torchrun is only asked to start one of them a node and to start it again if it crashes: to torchrun every
node is a job of rank 0 of 1. `--rdzv-endpoint` and `--rdzv-id` are handed on to the agent in the environment. Loaded by
stock torchrun through the entry point group `torchrun.handlers`.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch.distributed as dist
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousInfo, RendezvousParameters
from torch.distributed.elastic.rendezvous.api import RendezvousStoreInfo

from elastic_lsopt.elastic.agent.endpoint import ENDPOINT, JOB
from elastic_lsopt.elastic.mail.mailbox import HERE, host_store


class PrivateRendezvous(RendezvousHandler):
    """One node, at once, always; nobody ever waits to join it."""

    def __init__(self, parameters: RendezvousParameters) -> None:
        self._parameters = parameters
        os.environ[JOB] = parameters.run_id
        if parameters.endpoint:
            os.environ[ENDPOINT] = parameters.endpoint
        self._store: dist.TCPStore | None = None

    def get_backend(self) -> str:
        return "lsopt"

    @property
    def use_agent_store(self) -> bool:
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        # torchrun tells its process a MASTER_ADDR; this one is alive, of this node alone, and used by nobody.
        self._store, address = host_store(f"{HERE}:0")
        host, port = address.rsplit(":", 1)
        return RendezvousInfo(self._store, 0, 1, RendezvousStoreInfo(host, int(port)))

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        """Nobody else waits here."""

    def num_nodes_waiting(self) -> int:
        return 0

    def get_run_id(self) -> str:
        return self._parameters.run_id

    def shutdown(self) -> bool:
        return True


def handler() -> Callable[[RendezvousParameters], RendezvousHandler]:
    """What the entry point `lsopt` loads."""
    return PrivateRendezvous
