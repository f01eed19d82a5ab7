"""One rank's failure reaches the others within seconds, also while they wait for it inside a collective.

[Note: cutting the transport] gloo waits for a silent peer until the process group's timeout (half an hour by default),
and neither `abort()` nor `destroy_process_group()` closes its sockets while the framework holds the group. What gloo
does notice at once is a closed socket. So the rank that raises says why in the store, gives the others a moment to
report the same (a mistake that all ranks make alike blocks nobody, and needs no cut), and then shuts down its gloo
sockets: its peers' collectives raise, their perturbed passes restore their own shards, and they report the first
failure. The groups are gone after that; `resync` makes the copies of the weights right over a group of its own, and
the job ends (or, under the elastic runtime, re-forms).
"""

from __future__ import annotations

import time
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from elastic_lsopt.backends.fabric import Fabric, fabric_for
from elastic_lsopt.backends.fabric.ending import end_well
from elastic_lsopt.backends.fabric.signed_store import server_of
from elastic_lsopt.backends.fabric.sockets import sockets
from elastic_lsopt.backends.groups import present
from elastic_lsopt.errors import PeerFailed

AGREE_S = 1.0
"""How long a failing rank waits for the others to report a failure of their own before it cuts the transport."""
SETTLE_TIMEOUT_S = 60.0


class Transport:
    """The way in which this job's ranks talk, all replicas together (collective to make: two small gathers of numbers).

    Without a process group of several ranks it has nothing to do.
    """

    _made = 0

    def __init__(self) -> None:
        self.cut = False
        self.at_once = False
        """Cut without asking the others: the elastic runtime forms a new group, so there is nothing to agree on."""
        self._failures = 0
        self._reported: BaseException | None = None
        self._group: dist.ProcessGroupGloo | None = None
        replica, self._job = present().replica, present().job
        self.rank, self.world = replica.rank, replica.size
        self._ports: set[int] = set()
        Transport._made += 1
        if self._job.size > 1:
            end_well()
            self.learn_ports()
        self._prefix = f"elastic_lsopt/{Transport._made}"

    def learn_ports(self) -> None:
        """By which ports the ranks talk, also in a group that was made since (collective; two small gathers)."""
        mine = sorted({local for _, local, _, listens in sockets() if listens})
        heads = self._gather([Transport._made, len(mine)])
        # a newcomer has made fewer than a survivor: all go on from the largest number
        Transport._made = max(made for made, _ in heads)
        longest = max(ports for _, ports in heads)
        everyones = self._gather([*mine, *[0] * (longest - len(mine))])
        self._ports |= {port for ports in everyones for port in ports if port}

    @property
    def _store(self) -> dist.Store:
        """That all ranks of the job reach: of a job of one replica torch's own."""
        return self._job.own_store or dist.distributed_c10d._get_default_store()

    def _gather(self, own: list[int]) -> list[list[int]]:
        """Every rank's numbers (equally many)."""
        on_cpu = self._job.own_store is not None or "cpu:" in dist.get_backend_config()
        mine = torch.tensor(own, dtype=torch.int64, device="cpu" if on_cpu else torch.cuda.current_device())
        out = [torch.empty_like(mine) for _ in range(self._job.size)]
        assert self._job.handle is not None
        if self._job.own_store is None:
            dist.all_gather(out, mine, group=self._job.handle)
        else:
            self._job.handle.allgather([out], [mine]).wait()  # torch has not registered it
        return [numbers.tolist() for numbers in out]

    @property
    def fabric(self) -> Fabric:
        """The library by which the default group talks."""
        return fabric_for("cuda" if "cuda:nccl" in dist.get_backend_config() else "cpu")

    @property
    def settle_group(self) -> dist.ProcessGroupGloo | None:
        """The group over which `resync` makes the copies right after a cut; None: the framework's own works."""
        return self._group

    def refuse_cut(self) -> None:
        if self.cut:
            raise PeerFailed(
                "the process group was cut when a rank failed, so this job cannot go on; start it again "
                "(resume_from_checkpoint: auto continues from the last checkpoint)."
            )

    def report(self, error: BaseException) -> None:
        """See [Note: cutting the transport]. Takes AGREE_S at most; raises nothing."""
        if self._job.size == 1 or self.cut or error is self._reported:
            return
        if self.at_once:
            self.sever()
            return
        self._reported = error
        self._failures += 1
        key = f"{self._prefix}/failure/{self._failures}"
        try:
            store = self._store
            store.set(f"{key}/{self._job.rank}", f"{type(error).__name__}: {error}"[:500])
            others = [f"{key}/{r}" for r in range(self._job.size) if r != self._job.rank]
            end = time.monotonic() + AGREE_S
            while not (together := store.check(others)) and time.monotonic() < end:
                time.sleep(0.01)
            # The first verdict counts, so that a rank that reports at the last moment draws the same conclusion.
            verdict = store.compare_set(f"{key}/verdict", "", "together" if together else "cut")
        except (RuntimeError, OSError):  # the store's host has died: nobody can be asked
            verdict = b"cut"
        if verdict == b"cut":
            self.sever()

    def sever(self) -> None:
        """Shut down this rank's gloo sockets, from any thread: its own and its peers' collectives raise at once.

        See [Note: cutting the transport]. The store stays: `resync` needs it.
        """
        self.cut = True
        if self._job.size > 1:
            master = server_of(self._store)
            self.fabric.cut(self._ports, keep=master.port if isinstance(master, dist.TCPStore) else -1)

    def first_failure(self) -> str | None:
        """What another rank reported of the newest failure, if any: 'rank 1 raised ValueError: …'."""
        if self._job.size == 1 or not self._failures:
            return None
        for rank in range(self._job.size):
            key = f"{self._prefix}/failure/{self._failures}/{rank}"
            try:
                if rank != self._job.rank and self._store.check([key]):
                    said = self._store.get(key).decode()
                    if "Connection closed by peer" not in said and "Connection reset" not in said:
                        return f"rank {rank} raised {said}"
            except (RuntimeError, OSError):
                return None
        return None

    def repair(self) -> None:
        """After a cut, form a gloo group through the store (collective). Raises when not all ranks come in time."""
        if not self.cut or self._group is not None or self.world == 1:
            return
        store = dist.distributed_c10d._get_default_store()
        prefix = dist.PrefixStore(f"{self._prefix}/settle/{self._failures}", store)
        self._group = dist.ProcessGroupGloo(prefix, self.rank, self.world, timedelta(seconds=SETTLE_TIMEOUT_S))

    def gather(self, own: Tensor) -> list[Tensor]:
        """Every rank's `own` (equal shapes) over the settle group."""
        assert self._group is not None
        own = own.detach().cpu().contiguous()
        out = [torch.empty_like(own) for _ in range(self.world)]
        self._group.allgather([out], [own]).wait()  # type: ignore[attr-defined]
        return out
