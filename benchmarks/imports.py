"""What waiting for imports costs: the public names beyond torch, and a command's help beyond an empty interpreter.

Fresh processes, in turns, medians of the pairs.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Sequence

PAIRS = 7
NAMES = "import torch; from elastic_lsopt import ASAM, LPFSGD, SAM, Engine, LandscapeOptimizer, attach, initialize"
COMMANDS = (
    "", "train", "agent", "validate", "plan", "study", "status", "doctor", "runs", "report", "probe", "schema",
)  # fmt: skip
"""The sub-commands, after the command itself."""


def seconds(arguments: Sequence[str]) -> float:
    """Wall time of a fresh interpreter with these arguments, from its start to its end."""
    begin = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begin


def compare(name: str, ours: Sequence[str], base: Sequence[str], pairs: int) -> dict[str, object]:
    """The difference of the pairs, after one that fills the disk cache (two pairs at least)."""
    times = [(seconds(ours), seconds(base)) for _ in range(1 + pairs)][1:]
    beyond = [mine - theirs for mine, theirs in times]
    low, _, high = statistics.quantiles(beyond, n=4, method="inclusive")
    return {f"{name}_s": statistics.median(beyond), f"{name}_s_spread": [low, high]}


def run(pairs: int = PAIRS) -> dict[str, object]:
    figures = compare("import_beyond_torch", ["-c", NAMES], ["-c", "import torch"], pairs)
    for command in COMMANDS:
        asked = ["-m", "elastic_lsopt", *([command] if command else []), "--help"]
        name = f"help_{command}_beyond_python" if command else "help_beyond_python"
        figures |= compare(name, asked, ["-c", "pass"], pairs)
    return figures
