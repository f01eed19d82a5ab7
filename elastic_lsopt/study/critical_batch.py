"""The critical batch size of a comparison: up to about it a larger batch saves as many steps as it costs samples.

    S = S_min (1 + B_crit / B)            steps to the same loss at batch B, each batch with its own best values
    (S / S_min - 1) (E / E_min - 1) = 1   the same in samples E = S B, with B_crit = E_min / S_min

McCandlish, Kaplan, Amodei et al. 2018, "An Empirical Model of Large-Batch Training", arXiv 1812.06162, equations 2.11
and 2.12. S_min and B_crit are those with the smallest sum of squared relative errors of S, linear in (S_min, E_min).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from elastic_lsopt.config.compare import CompareConfig

AXIS = "global_batch_size"
LEAST = 3
"""Batches that a fit needs: two are always met by some curve."""
ROUNDING = 1e-9
"""An S_min of this share of the steps is none."""


def critical_batch(batches: Sequence[float], steps: Sequence[float]) -> tuple[float, float] | None:
    """(B_crit, S_min) of steps > 0 at batches > 0; None below three batches, or where no such curve has both > 0.

    So where steps fall as 1 / B to the largest batch (it is below B_crit), or do not fall at all.
    """
    if len(set(batches)) < LEAST:
        return None
    b, s = np.asarray(batches, float), np.asarray(steps, float)
    (fewest, samples), *_ = np.linalg.lstsq(np.stack([1 / s, 1 / (b * s)], axis=1), np.ones_like(s), rcond=None)
    bends = fewest > ROUNDING * s.min() and samples > 0
    return (float(samples / fewest), float(fewest)) if bends else None


def critical_batches(config: CompareConfig, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of each method (and point of the other axes), over the batches at which all of its runs have reached the target.

    Empty for a comparison without a target or the axis global_batch_size; labels of it that are no number are left out.
    """
    if config.target_loss is None or AXIS not in config.axes:
        return []
    found: dict[tuple[Any, ...], list[tuple[float, float]]] = {}
    others = ["method", "equal", *(axis for axis in config.axes if axis != AXIS)]
    for row in rows:
        told = row["numbers"].get("steps_to_target")
        if isinstance(row[AXIS], int | float) and told is not None and told["n"] == row["runs"]:
            found.setdefault(tuple(row[name] for name in others), []).append((row[AXIS], told["mean"]))
    out = []
    for place, points in found.items():
        batches, steps = zip(*points, strict=True)
        fit = critical_batch(batches, steps)
        told = None if fit is None else {"critical_batch": fit[0], "fewest_steps": fit[1]}
        out.append({**dict(zip(others, place, strict=True)), "batches": [*batches], **(told or {})})
    return [each for each in out if len(each["batches"]) >= LEAST]
