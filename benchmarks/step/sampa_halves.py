"""SAMPa's two gradients at once, each on half of the ranks, against one after the other: whole steps.

one_microbatch      for every two ranks: one pass after the other leaves half of the ranks without work
two_microbatches    for every two ranks: equally many forwards per rank either way
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

import elastic_lsopt as lso
from benchmarks.models import SIZES, Size, device, engine
from benchmarks.timing import ratio_of, rounds
from benchmarks.workers import on_ranks

COUNTS = {"one_microbatch": 1, "two_microbatches": 2}
"""Micro-batches for every two ranks."""


def microbatches(size: Size, count: int, deal: tuple[int, int]) -> list[lso.MicroBatch]:
    """Of `count` in all those that are dealt so to this rank, else one to be idle with."""
    torch.manual_seed(1)
    rank, ranks = deal
    ids = [torch.randint(size.vocabulary, (size.samples, size.sequence)).to(device()) for _ in range(count)]
    batches: list[dict[str, Tensor]] = [{"input_ids": x, "labels": x} for x in ids]
    own = [lso.MicroBatch(u, batches[u]) for u in range(rank, count, ranks)]
    return own or [lso.MicroBatch(0, batches[0], idle=True)]


def compare(size: str) -> dict[str, object]:
    """Steps of both in turns, inside a process group (collective)."""
    figures: dict[str, object] = {}
    halves, serial = (engine("ddp", SIZES[size], lso.SAMPa(halves=halves)) for halves in (True, False))
    for name, pairs in COUNTS.items():
        count = pairs * dist.get_world_size() // 2
        ours, theirs = (microbatches(SIZES[size], count, e.deal) for e in (halves, serial))
        times = rounds(
            SIZES[size].pairs,
            base=lambda theirs=theirs: serial.train_batch(theirs),
            ours=lambda ours=ours: halves.train_batch(ours),
        )
        assert halves.last_step is not None and not halves.last_step.skipped, "a skipped step measures nothing"
        figures |= ratio_of(times["ours"], times["base"]).figures(f"{name}_per_two_ranks_of_serial")
    return figures


def run() -> dict[str, object]:
    """On two ranks of a CPU, or on as many GPUs as there are (an even number)."""
    size = "gpu" if torch.cuda.is_available() else "cpu"
    if torch.cuda.is_available() and torch.cuda.device_count() % 2:
        return {"size": size, "not_measured": "halves need an even number of GPUs"}
    return {"size": size, **on_ranks("benchmarks.step.sampa_halves:compare", size=size)}
