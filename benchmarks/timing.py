"""Ratios that a busy machine cannot bend: pairs in one run, in turns A B B A, the median of the pairs' own ratios."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Ratio:
    """The median of `pairs` ratios, their quartiles, and what the medians of both sides were in seconds."""

    median: float
    low: float
    high: float
    pairs: int
    seconds: float
    base_seconds: float

    def figures(self, name: str) -> dict[str, object]:
        """As a benchmark reports it: the figure under its name, the rest beside it."""
        rest = asdict(self)
        return {
            name: rest.pop("median"),
            f"{name}_spread": [rest.pop("low"), rest.pop("high")],
            f"{name}_times": rest,
        }


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call on the slowest rank, to the end of what it launched."""
    _together()
    begin = time.perf_counter()
    work()
    _together()
    return time.perf_counter() - begin


def _together() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    if dist.is_initialized():
        dist.barrier()


def rounds(count: int, *, warm_up: bool = True, **works: Callable[[], object]) -> dict[str, list[float]]:
    """Seconds of every work in each round, after one round that warms up; the order turns round each time."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(-1 if warm_up else 0, count):
        for name in list(works)[:: 1 if turn % 2 else -1]:
            spent = seconds(works[name])
            if turn >= 0:
                times[name].append(spent)
    return times


def ratio_of(ours: list[float], base: list[float]) -> Ratio:
    """What `ours` costs beside `base`, round by round (two rounds at least)."""
    each = [a / b for a, b in zip(ours, base, strict=True)]
    low, _, high = statistics.quantiles(each, n=4, method="inclusive")
    return Ratio(statistics.median(each), low, high, len(each), statistics.median(ours), statistics.median(base))
