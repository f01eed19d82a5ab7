"""What the elastic layer costs a step: the runtime's own part, and the mirror of a 20 MB shard after each step.

Two nodes on this machine, FSDP2, 3.3M parameters with AdamW: 20 MB of state a rank. In one run, blocks of steps with
and without host versions and mirror take turns; the intervals between finished steps are compared, medians of
neighbouring blocks against each other. Without a mirror the layer's part is what lies between two steps.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

from benchmarks.elastic.job import BLOCK
from benchmarks.elastic.recovery import Nodes, Row

WIDTH, UNIT, BATCH = 185_000, 96, 192
STEPS = 160
SKIPPED = 16
"""The first steps, in which caches fill."""


def run() -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="bench-layer-") as folder:
        job = Nodes(
            Path(folder), stock=False, backend="fsdp2", width=WIDTH, unit=UNIT, batch=BATCH, slow_s=0.0, blocks=True
        )
        try:
            job.start()
            time.sleep(1.5)
            job.start()
            job.wait(lambda rows: sum(r["world"] == 2 for r in rows) > 2 * (STEPS + SKIPPED), "the steps", 300.0)
            rows = [r for r in job.rows() if r["world"] == 2]
        finally:
            job.end()
    ratios, steps, between = list[float](), list[float](), list[float]()
    for pid in {r["pid"] for r in rows}:
        mine = [r for r in rows if r["pid"] == pid][SKIPPED:]
        ratios += _ratios(mine)
        for a, b in pairwise(mine):
            if b["step"] % BLOCK and b["step"] // BLOCK % 2:  # no mirror in this one, nor at the end of the one before
                steps.append(b["seconds"])
                between.append((b["at"] - a["at"] - b["seconds"]) / b["seconds"])
    return {
        "step_s": statistics.median(steps),
        "layer_of_step_without_mirror": statistics.median(between),
        "layer_of_step_with_mirror": statistics.median(ratios) - 1,
        "layer_of_step_with_mirror_spread": [q - 1 for q in statistics.quantiles(ratios, n=4)[::2]],
        "blocks": len(ratios),
    }


def _ratios(rows: list[Row]) -> list[float]:
    """Of each two neighbouring blocks: the interval of a step with a mirror over that without.

    The version of a step is taken after it is noted, so it lies in the interval of the next one.
    """
    blocks = []
    for with_mirror, pairs in groupby(pairwise(rows), key=lambda p: p[0]["step"] // BLOCK % 2 == 0):
        intervals = [b["at"] - a["at"] for a, b in pairs]
        if len(intervals) == BLOCK:
            blocks.append((with_mirror, statistics.median(intervals)))
    return [(a if first else b) / (b if first else a) for (first, a), (_, b) in pairwise(blocks)]
