"""Open files: each process group of all ranks holds a connection to every other rank, and so meets `ulimit -n`."""

from __future__ import annotations

import resource

from elastic_lsopt.errors import UserError

GROUPS = 3
"""Of all ranks at a time: the default one, the mirror's, and a checkpoint's or an export's."""
OTHERS = 150
"""Files that a worker has open beside those: libraries, pipes, logs, stores, data."""


def files_of_a_rank(world: int, *, deepspeed: bool = False, cuda: bool = False) -> int:
    """Files that each of `world` ranks has open, about: a group takes world - 1 connections and a listening socket.

    DeepSpeed makes a group of its own; beside NCCL there is one more on gloo.
    """
    return (GROUPS + deepspeed + cuda) * world + OTHERS


def make_room() -> int:
    """Raise this process's limit of open files as far as it may, for its children too; the limit now."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def too_few(world: int, limit: int, *, deepspeed: bool = False, cuda: bool = False) -> str:
    """What is wrong with that many ranks under that limit of open files; empty: nothing."""
    needed = files_of_a_rank(world, deepspeed=deepspeed, cuda=cuda)
    if limit in (-1, resource.RLIM_INFINITY) or needed <= limit:
        return ""
    return (
        f"{world} ranks need about {needed:,} open files each, a connection to every other in each of their process "
        f"groups, and the limit here is {limit:,}; raise it (ulimit -Hn, LimitNOFILE, nofile in limits.conf)."
    )


def refuse_too_few(world: int, *, deepspeed: bool = False, cuda: bool = False) -> None:
    """Raise UserError where a group of `world` ranks would fail for want of open files."""
    if wrong := too_few(world, make_room(), deepspeed=deepspeed, cuda=cuda):
        raise UserError(wrong)
