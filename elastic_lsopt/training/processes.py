"""The processes of a job: joined where a launcher started them, started here where none did.

[Note: who says what went wrong] When a rank fails, its peers fail too, in the collective in which they wait for it. The
first failure is noted in the job's store, so that a user's mistake is one line of one rank and not a line of each, and
a rank that only followed knows that there is nothing to add.
"""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from datetime import timedelta
from types import FrameType

import torch
import torch.distributed as dist

from elastic_lsopt.backends.groups import form_replicas
from elastic_lsopt.elastic.mail.signing import SECRET_VARIABLE
from elastic_lsopt.elastic.worker.meeting import meet
from elastic_lsopt.errors import UserError
from elastic_lsopt.world import World, on_gpu

LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
CHILD = "ELASTIC_LSOPT_CHILD"
"""Set for the workers that `start_workers` starts."""
HOST = "127.0.0.1"
LEAVE_S = 30.0
"""How long the other workers have to end by themselves after one has failed."""
USERS = 2
"""Exit code of a worker that has met a user's mistake, which is that of all."""
COLLECTIVE_TIMEOUT = timedelta(minutes=30)


def launched() -> bool:
    """Whether a launcher (torchrun, deepspeed, or `start_workers`) has started this process as one of several."""
    return all(name in os.environ for name in LAUNCHED)


def join(replicas: int = 1) -> World:
    """Join the process group that the environment describes; a process by itself forms a world of one.

    Of several replicas each forms its own group, and the world is that of this process's replica. Where the environment
    holds the job's secret (SECRET_VARIABLE, on all ranks or on none), ranks believe each other only what is signed with
    it. Raises UserError for replicas that do not divide the ranks.
    """
    local = int(os.environ.get("LOCAL_RANK", "0"))
    gpu = on_gpu()
    device = torch.device("cuda", local) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    if CHILD in os.environ:
        threading.Thread(target=_end_with_parent, daemon=True).start()
    store, rank, size = next(dist.rendezvous("env://")) if launched() else (dist.HashStore(), 0, 1)
    if secret := os.environ.get(SECRET_VARIABLE):
        store = meet(store, rank, size, secret.encode())
    backend = "cpu:gloo,cuda:nccl" if gpu else "gloo"
    if replicas > 1:
        return _join_replica(replicas, backend, device, store, rank, size)
    dist.init_process_group(
        backend, store=dist.PrefixStore("default", store), rank=rank, world_size=size, timeout=COLLECTIVE_TIMEOUT
    )
    return World(rank, size, device, store)


def _join_replica(replicas: int, backend: str, device: torch.device, store: dist.Store, rank: int, size: int) -> World:
    if size % replicas:
        raise UserError(
            f"consensus.replicas={replicas} must divide the {size} rank(s) of the job; start "
            f"{-(-size // replicas) * replicas} of them (`workers:` where no launcher does)."
        )
    sizes = [size // replicas] * replicas
    own = form_replicas(
        dist.PrefixStore("replicas", store), rank, sizes, COLLECTIVE_TIMEOUT, apart=True, backend=backend
    )
    return World(
        own.replica.rank, own.replica.size, device, store, replica=own.number, sizes=tuple(sizes),
        meetings=dist.PrefixStore("meetings", store),
    )  # fmt: skip


def _end_with_parent() -> None:
    """Standard input is a pipe that the parent holds: where it ends, the parent is gone, and this worker stops too."""
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def host(count: int) -> tuple[dist.TCPStore, dict[str, str]]:
    """The store of `count` ranks on this machine, which lasts as long as it is held, and their environment but for RANK
    and LOCAL_RANK."""
    # Held here, on the loopback address alone: no port to guess, and it outlives a failing worker.
    with socket.create_server((HOST, 0)) as listener:
        port = listener.getsockname()[1]
        store = dist.TCPStore(
            HOST, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach(), use_libuv=True
        )
    return store, {
        SECRET_VARIABLE: secrets.token_hex(32), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": HOST, "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True",
    }  # fmt: skip


def start_workers(
    count: int, arguments: Sequence[str], *, module: str = "elastic_lsopt.train", replicas: int = 1
) -> int:  # fmt: skip
    """Run `python -m MODULE ARGUMENTS` as `count` workers on this machine; returns the job's exit code.

    SIGTERM and SIGINT are passed on as SIGTERM, so that the workers end after their step; the same happens when this
    process is killed. When a worker fails, the others get LEAVE_S to end by themselves; of several `replicas` that go
    their own ways only its own, unless it was a user's mistake. Workers share the cores.
    """
    store, meeting = host(count)
    environment = {
        **os.environ, **meeting, CHILD: "1", SECRET_VARIABLE: os.environ.get(SECRET_VARIABLE, meeting[SECRET_VARIABLE]),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count))),
    }  # fmt: skip
    workers: list[subprocess.Popen[bytes]] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        for worker in workers:
            if worker.poll() is None:
                worker.terminate()

    before = {s: signal.signal(s, pass_on) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        for rank in range(count):
            workers.append(
                subprocess.Popen(
                    [sys.executable, "-m", module, *arguments],
                    env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                    stdin=subprocess.PIPE,
                    start_new_session=True,  # a terminal's Ctrl-C reaches this process alone, which passes it on
                )
            )
        return _wait(workers, replicas)
    finally:
        for worker in workers:
            if worker.poll() is None:
                worker.kill()
            worker.wait()
        for number, handler in before.items():
            signal.signal(number, handler)
        del store


def _wait(workers: Sequence[subprocess.Popen[bytes]], replicas: int) -> int:
    """The first bad exit code, or 0: also where a replica has ended well without another that is lost."""
    size, first_bad, end = len(workers) // replicas, 0, float("inf")
    lost: dict[int, float] = {}
    """Until when the workers of a replica that has lost one may end by themselves."""
    while time.monotonic() < end:
        codes = [w.poll() for w in workers]
        for rank, code in enumerate(codes):
            if not code or (replica := rank // size) in lost:
                continue
            first_bad, lost[replica] = first_bad or code, time.monotonic() + LEAVE_S
            if code == USERS or replicas == 1:
                end = min(end, lost[replica])
            if code < 0:  # it could not say so itself
                rest = "the others end too" if replicas == 1 else f"replica {replica} is no more, the others go on"
                print(
                    f"elastic-lsopt: worker {rank} was ended by {signal.Signals(-code).name}; {rest}.", file=sys.stderr
                )
        for rank, worker in enumerate(workers):
            if time.monotonic() > lost.get(rank // size, end) and worker.poll() is None:
                worker.kill()
        if all(c is not None for c in codes):
            break
        time.sleep(0.05)
    if end == float("inf") and len(lost) < replicas:
        return 0
    return first_bad if first_bad >= 0 else 128 - first_bad
