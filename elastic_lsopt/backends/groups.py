"""Who is together with whom: every sum, average and dealing of micro-batches names one of these.

    job       all ranks of this generation: order of samples, indices of micro-batches, checkpoints, journal, stop
              signals
    replica   the ranks that train one copy of the model in step: gradients, losses, counts, steps that are skipped
    shard     the ranks of a replica that together hold the vector once; of a backend, which knows where its pieces are

[Note: the default group is the replica's] torch's default process group of a process is its replica's, and RANK and
WORLD_SIZE say its place there. So DDP, FSDP2 and DeepSpeed, which take the default group for the world, need to know
nothing of replicas: a replica is to them a job of its own. The job's group is our own, made directly on gloo and never
registered with torch; `destroy_process_group` knows nothing of it. Without several replicas it is the default group.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Group:
    """This process's place among ranks that talk together."""

    rank: int
    size: int
    handle: dist.ProcessGroup | None = None
    """None: this rank alone."""
    own_store: dist.Store | None = None
    """The store through which a group of ours was made; None: torch's own."""

    @staticmethod
    def default() -> Group:
        """Torch's default group."""
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return Group(0, 1)
        return Group(dist.get_rank(), dist.get_world_size(), dist.group.WORLD)

    @staticmethod
    def of(handle: dist.ProcessGroup | None) -> Group:
        """A group of torch's, as a mesh or DeepSpeed gives it."""
        if handle is None or dist.get_world_size(handle) == 1:
            return Group(0, 1)
        return Group(dist.get_rank(handle), dist.get_world_size(handle), handle)

    def sum_(self, values: Tensor) -> Tensor:
        """Sum in place over the group (collective); nothing to do for a rank alone."""
        if self.handle is None:
            return values
        if self.own_store is None:
            dist.all_reduce(values, group=self.handle)
            return values
        on_host = values.cpu()
        self.handle.allreduce([on_host]).wait()  # dist.all_reduce hides its error: torch has not registered it
        return values.copy_(on_host) if values.device.type != "cpu" else values

    def again(self, name: str, timeout: timedelta) -> dist.ProcessGroup | None:
        """The same ranks in a gloo group of their own, for one that talks from another thread (collective)."""
        if self.handle is None:
            return None
        if self.own_store is not None:
            return gloo(dist.PrefixStore(name, self.own_store), self.rank, self.size, timeout)
        made = dist.new_group(backend="gloo", timeout=timeout)
        assert isinstance(made, dist.ProcessGroup)
        return made

    def end(self, again: dist.ProcessGroup | None) -> None:
        """Let go of a group that `again` has made."""
        if again is not None and self.own_store is None:
            dist.destroy_process_group(again)


@dataclass(frozen=True)
class Groups:
    """`number` is this replica's among `replicas` of the job."""

    job: Group
    replica: Group
    number: int = 0
    replicas: int = 1
    apart: bool = False
    """Replicas share no step: to each its ranks are the whole job, in whatever it saves and exports."""


_formed: Groups | None = None


def present() -> Groups:
    """The groups of this process as they are now: torch's default group alone, unless several replicas were formed."""
    if _formed is not None:
        return _formed
    default = Group.default()
    return Groups(default, default)


def forget() -> None:
    """Torch's default group ends, and with it what was formed around it: a replica of one rank would not see that."""
    global _formed  # noqa: PLW0603
    _formed = None


def form_replicas(
    store: dist.Store, rank: int, sizes: Sequence[int], timeout: timedelta, *, apart: bool = False,
    backend: str = "gloo",
) -> Groups:  # fmt: skip
    """Replicas of these sizes, in the order of the job's ranks; this process is the job's `rank` (collective).

    `store` is one that no other group has used. `apart`: replicas that meet now and then, and share no step: each is
    the whole job to itself, so that none waits for another or ends with it. `backend` is that of the replica's group.
    """
    global _formed  # noqa: PLW0603
    number = next(i for i in range(len(sizes)) if rank < sum(sizes[: i + 1]))
    own, size = rank - sum(sizes[:number]), sizes[number]
    os.environ.update(RANK=str(own), WORLD_SIZE=str(size))  # ZeRO-3 refuses a group whose size is not WORLD_SIZE
    dist.init_process_group(
        backend, store=dist.PrefixStore(f"replica/{number}", store), rank=own, world_size=size, timeout=timeout
    )
    if apart:
        return formed_apart(number, len(sizes))
    through = dist.PrefixStore("job", store)
    job = gloo(dist.PrefixStore("steps", through), rank, sum(sizes), timeout)
    _formed = Groups(Group(rank, sum(sizes), job, through), Group.default(), number, len(sizes))
    return _formed


def formed_apart(number: int, replicas: int) -> Groups:
    """Torch's default group is replica `number` of `replicas`, each of which is the whole job to itself."""
    global _formed  # noqa: PLW0603
    _formed = Groups(Group.default(), Group.default(), number, replicas, apart=True)
    return _formed


def beside(name: str, store: dist.Store, rank: int, size: int, timeout: timedelta) -> Group:
    """One more group, on gloo and unknown to torch, of ranks that share a store (collective)."""
    own = dist.PrefixStore(name, store)
    return Group(rank, size, gloo(own, rank, size, timeout), own)


def gloo(store: dist.Store, rank: int, size: int, timeout: timedelta) -> dist.ProcessGroup:
    """A gloo group that torch's registry does not know (collective)."""
    group = dist.ProcessGroup(store, rank, size)
    backend = dist.ProcessGroupGloo(store, rank, size, timeout)
    group._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.GLOO, backend)
    return group
