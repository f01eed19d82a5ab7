"""Ranks whose data is not the same."""

from __future__ import annotations

from functools import partial

import torch
import torch.distributed as dist

from elastic_lsopt.elastic.worker.same_data import SameData, identity_of
from elastic_lsopt.errors import PeerFailed, UserError
from tests.cases.elastic.jobs import refused


def job(path: str, places: list[str], key: str = "dataset") -> str:
    """What a plain job is refused with where each rank reads a file or folder of its own."""
    return refused(path, [f"{key}={places[dist.get_rank()]}"])


def joined(lengths: list[list[int]]) -> list[str]:
    """What each rank hears in each generation, whose ranks have data of these lengths; negative: of a new process."""
    heard, process = [], SameData()
    assert dist.group.WORLD is not None
    for generation in lengths:
        length = generation[dist.get_rank()]
        if length < 0:
            process = SameData()
        try:
            process.check(dist.group.WORLD, partial(identity_of, torch.arange(abs(length))))
            heard.append("agreed")
        except (UserError, PeerFailed) as error:
            heard.append(f"{type(error).__name__}: {error}")
    return heard
