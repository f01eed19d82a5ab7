"""The processes of a job: joined where a launcher started them, started here where none did."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType

import torch
import torch.distributed as dist

LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
LEAVE_S = 30.0
"""How long the other workers have to end by themselves after one has failed."""
COLLECTIVE_TIMEOUT_S = 1800.0


@dataclass(frozen=True)
class World:
    """This process's place in the job."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0


def launched() -> bool:
    """Whether a launcher (torchrun, deepspeed, or `start_workers`) has started this process as one of several."""
    return all(name in os.environ for name in LAUNCHED)


def join() -> World:
    """Join the process group that the environment describes; a process by itself forms a world of one."""
    if not launched():
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    local = int(os.environ.get("LOCAL_RANK", "0"))
    on_gpu = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"
    device = torch.device("cuda", local) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=timedelta(seconds=COLLECTIVE_TIMEOUT_S))
    return World(dist.get_rank(), dist.get_world_size(), device)


def start_workers(count: int, arguments: Sequence[str]) -> int:
    """Run `python -m elastic_lsopt.train ARGUMENTS` as `count` workers on this machine; returns the job's exit code.

    SIGTERM and SIGINT are passed on, so that the workers end after their step. When one fails, the others get
    LEAVE_S to end by themselves. The threads of a core are shared out.
    """
    shared = {
        "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count))),
    }  # fmt: skip
    workers: list[subprocess.Popen[bytes]] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        for worker in workers:
            if worker.poll() is None:
                worker.send_signal(signal.SIGTERM)

    before = {s: signal.signal(s, pass_on) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        for rank in range(count):
            workers.append(
                subprocess.Popen(
                    [sys.executable, "-m", "elastic_lsopt.train", *arguments],
                    env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                )
            )
        return _wait(workers)
    finally:
        for worker in workers:
            if worker.poll() is None:
                worker.kill()
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(workers: Sequence[subprocess.Popen[bytes]]) -> int:
    """The first bad exit code, or 0."""
    first_bad, end = 0, float("inf")
    while time.monotonic() < end:
        codes = [w.poll() for w in workers]
        if not first_bad:
            first_bad = next((c for c in codes if c), 0)
            end = time.monotonic() + LEAVE_S if first_bad else end
        if all(c is not None for c in codes):
            break
        time.sleep(0.05)
    return first_bad if first_bad >= 0 else 128 - first_bad


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
