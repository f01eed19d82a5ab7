"""When a replica's GPU is lost and when another stands in its place: drawn, or read from a trace.

Every mode is simulated with the same outages, so that modes differ by what they do and not by luck.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from elastic_lsopt.simulation.scenario import Scenario


@dataclass(frozen=True)
class Outages:
    """In the order of `down_s`. A replica is lost as a `whole`, or one GPU of it; then those of a replica may overlap.

    `traced`: they have happened, and no scenario's mean time between failures stands behind them.
    """

    replica: np.ndarray[Any, np.dtype[np.int64]]
    down_s: np.ndarray[Any, np.dtype[np.float64]]
    up_s: np.ndarray[Any, np.dtype[np.float64]]
    whole: bool
    traced: bool = False

    def __len__(self) -> int:
        return len(self.replica)

    def __iter__(self) -> Iterator[tuple[int, float, float]]:
        return zip(self.replica.tolist(), self.down_s.tolist(), self.up_s.tolist(), strict=True)

    def back(self, restart_s: float) -> Outages:
        """With `up_s` as when each is at work again; what falls into an outage or its restart lengthens it."""
        if not self.whole:
            return replace(self, up_s=self.up_s + restart_s)
        rows: list[list[Any]] = []
        last: dict[int, list[Any]] = {}
        for replica, down_s, up_s in self:
            row = last.get(replica)
            if row is not None and down_s < row[2]:
                row[2] = max(row[2], up_s + restart_s)
            else:
                last[replica] = [replica, down_s, up_s + restart_s]
                rows.append(last[replica])
        columns = list(zip(*rows, strict=True)) or [(), (), ()]
        return replace(
            self, replica=np.array(columns[0], np.int64), down_s=np.array(columns[1], float),
            up_s=np.array(columns[2], float),
        )  # fmt: skip

    def until(self, end_s: float) -> Outages:
        """Those that begin before."""
        n = int(np.searchsorted(self.down_s, end_s))
        return replace(self, replica=self.replica[:n], down_s=self.down_s[:n], up_s=self.up_s[:n])


def drawn(scenario: Scenario) -> Outages:
    """Each GPU fails an exponential time after its first step, again and again, for as long as the job is watched."""
    rng = np.random.default_rng([scenario.seed, 1])
    mean_s, end_s = scenario.mtbf_h * 3600.0, scenario.horizon_s
    chips = np.arange(scenario.replicas * scenario.gpus)
    begin = np.zeros(len(chips))
    replicas, downs = [], []
    while len(chips) and np.isfinite(mean_s):
        down = begin + rng.exponential(mean_s, len(chips))
        fails = down < end_s
        chips, down = chips[fails], down[fails]
        replicas.append(chips // scenario.gpus)
        downs.append(down)
        begin = down + scenario.replace_s + scenario.restart_s
    replica = np.concatenate([np.empty(0, np.int64), *replicas])
    down_s = np.concatenate([np.empty(0), *downs])
    order = np.argsort(down_s, kind="stable")
    return Outages(replica[order], down_s[order], down_s[order] + scenario.replace_s, whole=scenario.gpus == 1)
