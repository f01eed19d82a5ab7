"""Real processes of replicas that meet, on one host or on a host each: every rank runs `module:function(place, …)`.

What a rank says (`place.say`) is there when it is killed. The job's store is a process of its own, on a host of its
own where there is a network: so no rank's death or stop touches it.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from benchmarks.machine import ROOT
from benchmarks.replicas.network import Links
from elastic_lsopt.api.replicas.consensus import Consensus
from elastic_lsopt.backends.groups import Groups, form_replicas
from elastic_lsopt.consensus import registry
from tests.processes.ranks import rank_environment
from tests.processes.warm import Popen

PATIENCE = timedelta(seconds=120)
STORE, PORT = "store", 29500
"""The store's host, where there are hosts, and its port there."""
Line = dict[str, Any]
C = TypeVar("C", bound=Consensus)


@dataclass(frozen=True)
class Place:
    """A rank's, in a job of replicas of these sizes."""

    rank: int
    sizes: tuple[int, ...]
    number: int
    """Its replica's."""
    own: int
    """Its rank in the replica."""
    store: dist.Store
    says: Path
    hosted: bool
    """It is on a host of its own."""

    def say(self, **line: Any) -> None:
        with self.says.open("a") as out:
            out.write(json.dumps(line) + "\n")

    def form(self) -> Groups:
        """torch's default group is this replica's."""
        return form_replicas(dist.PrefixStore("groups", self.store), self.rank, self.sizes, PATIENCE, apart=True)

    def one_world(self) -> None:
        """torch's default group is of all ranks: synchronous data parallelism."""
        dist.init_process_group(
            "gloo", store=dist.PrefixStore("world", self.store), rank=self.rank, world_size=sum(self.sizes),
            timeout=PATIENCE,
        )  # fmt: skip

    def consensus(
        self, name: str, rule: str, *, kind: type[C] = Consensus, timeout_s: float = 60.0, **more: Any
    ) -> C:  # fmt: skip
        """Of that name, which no other has; `more` are the rule's own values, and bits and top_k."""
        how = {key: more.pop(key) for key in ("bits", "top_k") if key in more}
        store = dist.PrefixStore(f"consensus/{name}", self.store)
        replicas = tuple(range(len(self.sizes)))
        return kind(registry.build(rule, **more), store, replicas=replicas, timeout_s=timeout_s, **how)

    def meet(self, name: str) -> None:
        """Wait for all ranks, by the store."""
        self.store.add(f"there/{name}", 1)
        while self.store.add(f"there/{name}", 0) < sum(self.sizes):
            time.sleep(0.002)


class Job:
    """The processes of a job; a context manager. `hosts`: the host of each replica."""

    def __init__(
        self, case: str, sizes: Sequence[int], *, network: Links | None = None, hosts: Sequence[str] = (),
        each: dict[int, dict[str, Any]] | None = None, **arguments: Any,
    ) -> None:  # fmt: skip
        self._case, self._sizes, self._network, self._hosts = case, tuple(sizes), network, tuple(hosts)
        self._each, self._arguments = each or {}, arguments
        self.processes: list[subprocess.Popen[Any]] = []

    def __enter__(self) -> Job:
        self._folder = tempfile.TemporaryDirectory(prefix="bench-replicas-")
        self.folder = Path(self._folder.name)
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            with suppress(ProcessLookupError):
                process.kill()
            process.wait()
        self._folder.cleanup()

    def _start(self) -> None:
        if self._network is None:
            self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=PATIENCE)
            address, port = "127.0.0.1", self._store.port
        else:
            address, port = self._network.address(STORE), PORT
            self._launch("-c", _HOLD.format(address=address, port=port), host=STORE, log="store")
        for rank in range(sum(self._sizes)):
            number = next(i for i in range(len(self._sizes)) if rank < sum(self._sizes[: i + 1]))
            order = {
                "case": self._case, "rank": rank, "sizes": self._sizes, "number": number, "address": address,
                "port": port, "hosted": self._network is not None, "says": str(self.folder / f"{rank}.jsonl"),
                "arguments": {**self._arguments, **self._each.get(rank, {})},
            }  # fmt: skip
            host = self._hosts[number] if self._network is not None else None
            self._launch("-m", "benchmarks.replicas.job", json.dumps(order), host=host, log=str(rank))

    def _launch(self, *arguments: str, host: str | None, log: str) -> None:
        inside = self._network.inside(host) if self._network is not None and host is not None else []
        more = {"GLOO_SOCKET_IFNAME": "eth0"} if inside else {}
        with (self.folder / f"{log}.log").open("wb") as out:
            process = Popen(
                [*inside, sys.executable, *arguments], cwd=ROOT, env=rank_environment(**more), stdout=out, stderr=out
            )
        self.processes.append(process)

    @property
    def ranks(self) -> list[subprocess.Popen[Any]]:
        return self.processes[-sum(self._sizes) :]

    def lines(self) -> list[list[Line]]:
        """What each rank has said so far."""
        out = []
        for rank in range(sum(self._sizes)):
            file, found = self.folder / f"{rank}.jsonl", []
            for text in file.read_text().splitlines() if file.exists() else ():
                with suppress(json.JSONDecodeError):  # the last of one that was killed
                    found.append(json.loads(text))
            out.append(found)
        return out

    def end(self, limit_s: float, *, may_die: Sequence[int] = ()) -> list[list[Line]]:
        """What each rank has said when all have ended. Raises RuntimeError with the logs where one ends badly, but for
        those who may, or not in time."""
        end = time.monotonic() + limit_s
        for rank, process in enumerate(self.ranks):
            try:
                code = process.wait(max(0.1, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                code = None
            if code != 0 and rank not in may_die:
                raise RuntimeError(f"rank {rank}: code {code}\n{self.logs()}")
        return self.lines()

    def logs(self) -> str:
        return "\n".join(
            f"--- {file.stem}\n{file.read_text(errors='replace')[-1500:]}" for file in sorted(self.folder.glob("*.log"))
        )

    def stop_and_wake(self, rank: int, asleep_s: float, limit_s: float) -> None:
        """Wait until the rank has stopped itself, and wake it so much later."""
        pid, end = self.ranks[rank].pid, time.monotonic() + limit_s
        while not stopped(pid):
            if time.monotonic() > end:
                raise RuntimeError(f"rank {rank} has not stopped in {limit_s} s\n{self.logs()}")
            time.sleep(0.005)
        time.sleep(asleep_s)
        os.kill(pid, signal.SIGCONT)


def stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


_HOLD = """import time, torch.distributed as dist
from datetime import timedelta
store = dist.TCPStore("{address}", {port}, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
time.sleep(1e6)"""


def main() -> None:
    """One rank."""
    order = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    sizes, number, rank = tuple(order["sizes"]), order["number"], order["rank"]
    end = time.monotonic() + PATIENCE.total_seconds()
    while True:
        try:
            store = dist.TCPStore(order["address"], order["port"], is_master=False, timeout=PATIENCE)
            break
        except (RuntimeError, dist.DistError):  # it is not there yet
            if time.monotonic() > end:
                raise
            time.sleep(0.1)
    place = Place(rank, sizes, number, rank - sum(sizes[:number]), store, Path(order["says"]), order["hosted"])
    module, function = order["case"].split(":")
    getattr(importlib.import_module(module), function)(place, **order["arguments"])
    os._exit(0)  # groups whose peers are gone may not end


if __name__ == "__main__":
    main()
