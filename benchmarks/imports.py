"""How long `import elastic_lsopt` takes beyond `import torch`: fresh processes, in turns, medians."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

PAIRS = 7


def seconds(module: str) -> float:
    """Wall time of a fresh interpreter that imports the module and ends."""
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-c", f"import {module}"], check=True)
    return time.perf_counter() - begin


def compare(pairs: int, *, ours: str = "elastic_lsopt", base: str = "torch") -> dict[str, object]:
    """The difference of the pairs, after one that fills the disk cache (two pairs at least)."""
    times = [(seconds(ours), seconds(base)) for _ in range(1 + pairs)][1:]
    beyond = [mine - theirs for mine, theirs in times]
    low, _, high = statistics.quantiles(beyond, n=4, method="inclusive")
    return {
        f"import_beyond_{base}_s": statistics.median(beyond),
        f"import_beyond_{base}_s_spread": [low, high],
        f"import_{ours}_s": statistics.median(mine for mine, _ in times),
        f"import_{base}_s": statistics.median(theirs for _, theirs in times),
    }


def run() -> dict[str, object]:
    return compare(PAIRS)
