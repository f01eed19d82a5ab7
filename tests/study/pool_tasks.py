"""Tasks for the processes of a pool, where the server that forks them can import them."""

import os
import signal
import time
from pathlib import Path

import torch

from elastic_lsopt.training.classifiers import mlp


def behave(task: str) -> tuple[str, int, int]:
    kind, _, number = task.partition(" ")
    if kind == "raise":
        raise ValueError("no\n  such luck")
    if kind == "hang":
        time.sleep(600)
    if kind == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "leave":
        os._exit(3)
    if kind == "nothing left":
        raise MemoryError
    time.sleep(float(number if kind == "sleep" else 0))
    return task, os.getpid(), torch.get_num_threads()


def mlp_held_by(held: str, cells: str, **shape: int) -> torch.nn.Module:
    """A comparison's model: once two of its runs are done, it is not built before the file `held` is gone."""

    def waits() -> bool:
        return Path(held).exists() and Path(cells).exists() and Path(cells).read_bytes().count(b"\n") >= 2

    end = time.monotonic() + 60
    while waits() and time.monotonic() < end:
        time.sleep(0.01)
    return mlp(**shape)


def say_and_wait(target: str) -> None:
    """Write this process's id, then wait."""
    Path(target).write_text(str(os.getpid()))
    time.sleep(60)


def as_rank(task: str) -> tuple[str, str]:
    """A task of several processes, of which the one that it names fails."""
    rank = os.environ["RANK"]
    if task == rank:
        raise ValueError("no such luck")
    if task in "0123" and task:
        time.sleep(600)
    return rank, os.environ["WORLD_SIZE"]
