"""This process's place in the job, in one generation of its members."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist

from elastic_lsopt.errors import UserError
from elastic_lsopt.plan import Plan

T = TypeVar("T")
LINE_BYTES = 1000
"""Longest error that `World.on_first` tells the other ranks."""


@dataclass(frozen=True)
class World:
    """One rank of `size`. `generation` counts the changes of members; a job without an elastic block stays at 0."""

    rank: int
    size: int
    device: torch.device
    store: dist.Store
    generation: int = 0
    plan: Plan | None = None
    """What batch and rates are in this generation; None outside elastic jobs."""
    rehearsal: bool = False
    """Nothing is trained here: a worker of an elastic job builds once, on the CPU, to have its imports behind it."""
    job: str = ""
    """Names the job's life, as long as one worker that has been in it lives; "" outside elastic jobs."""
    may_commit: Callable[[int], bool] | None = None
    """Whether a checkpoint of that step may still get its name, asked by rank 0; None: nobody contests it."""
    replica: int = 0
    """Where replicas go their own way (`consensus`) this one's number; rank and size are then this replica's."""
    sizes: tuple[int, ...] = ()
    """Ranks of each replica, 0 of one that is vacant; () where there is one."""
    meetings: dist.Store | None = None
    """Through which replicas meet; None where there is one. In an elastic job another object is another store, and
    empty: its host has changed."""
    newcomer: bool = False
    """This replica has no state, and others train: it is given the model by them."""
    outdated: Callable[[], bool] | None = None
    """In an elastic job: whether this replica's members are about to change, so that waiting for others must end."""
    lost: Callable[[int], bool] | None = None
    """In an elastic job: whether that replica has lost its members, or got others, since this world was told of; then
    nobody need wait for it."""

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def speaks(self) -> bool:
        """Whether this rank tells the user how the job goes."""
        return self.rank == 0 and self.replica == 0

    def on_first(self, act: Callable[[], T]) -> T | None:
        """`act()` on rank 0, None on the others; a UserError that it raises is raised on all (collective)."""
        result, said = None, b""
        if self.is_first:
            try:
                result = act()
            except UserError as error:
                said = str(error).encode()[:LINE_BYTES] or b"?"
        line = torch.zeros(LINE_BYTES, dtype=torch.uint8)
        line[: len(said)] = torch.tensor(list(said), dtype=torch.uint8)
        line = line.to(self.device)
        dist.broadcast(line, 0)
        if told := bytes(line.tolist()).rstrip(b"\0"):
            raise UserError(told.decode(errors="replace"))
        return result

    def first_failure(self, own: str) -> str:
        """What failed first in this job: `own`, if this rank is the first to say so; "" where nobody can be asked.

        See training/processes.py [Note: who says what went wrong].
        """
        try:
            return self.store.compare_set("elastic_lsopt/first_failure", "", own).decode()
        except (RuntimeError, OSError):  # the process that held the store has ended
            return ""

    def wait_for_the_others_words(self, timeout_s: float) -> None:
        """Return when every rank has called this, or after `timeout_s`: one that is dead will not.

        A launcher ends the others as soon as one has ended, and who is ended in the middle of a word says nothing.
        """
        key, end = f"elastic_lsopt/has_said/{self.replica}", time.monotonic() + timeout_s
        try:
            self.store.set(f"{key}/{self.rank}", "")
            while not self.store.check([f"{key}/{r}" for r in range(self.size)]) and time.monotonic() < end:
                time.sleep(0.02)
        except (RuntimeError, OSError):  # the process that held the store has ended
            return


def on_gpu() -> bool:
    """Whether this process computes on a GPU: there is one, and the environment does not say otherwise."""
    return torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"


def device_of(local: int) -> torch.device:
    """The device of a node's worker number `local`, made the present one; the CPU where there is no GPU."""
    if on_gpu():
        device = torch.device("cuda", local % torch.cuda.device_count())
        torch.cuda.set_device(device)
        return device
    return torch.device("cpu")
