"""loss.png: training and held-out loss of a run against its samples. Reads metrics.jsonl, nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

TRAINING, HELD_OUT, REFERENCE = "#4477aa", "#ee6677", "#777777"  # told apart by the colour-blind too


def draw_loss(
    rows: Sequence[dict[str, Any]],
    target: Path,
    *,
    title: str,
    unit: str = "nats",
    reference: tuple[str, float] | None = None,
) -> None:
    """Draw the steps' `loss` (faint, and smoothed) and `eval_loss`, with a dashed line at a named reference.

    Steps whose loss is null (skipped, not finite) leave a gap in nothing but themselves.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
    if points := _points(rows, "loss"):
        x, y = zip(*points, strict=True)
        axes.plot(x, y, color=TRAINING, alpha=0.3, linewidth=0.8)
        axes.plot(x, smoothed(y), color=TRAINING, linewidth=1.6, label="training, smoothed")
    if points := _points(rows, "eval_loss"):
        x, y = zip(*points, strict=True)
        axes.plot(x, y, "o-", color=HELD_OUT, markersize=4, label=f"held out ({y[-1]:.3f} at the end)")
    if reference is not None:
        name, value = reference
        axes.axhline(value, color=REFERENCE, linestyle="--", linewidth=1, label=f"{name} ({value:.3f})")
    axes.set(xlabel="samples", ylabel=f"loss, {unit}")
    axes.set_title(title, loc="left", fontsize=11)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    axes.margins(x=0.02)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)
    figure.savefig(target, dpi=150)


def smoothed(values: Sequence[float], share: int = 60) -> list[float]:
    """Each value's mean with its neighbours, as many on the left as on the right: no lag where the curve is steep.

    At most 1/`share` of all values on each side, fewer near the ends.
    """
    sums, n = [0.0, *accumulate(values)], len(values)
    reach = [min(n // share, i, n - 1 - i) for i in range(n)]
    return [(sums[i + r + 1] - sums[i - r]) / (2 * r + 1) for i, r in enumerate(reach)]


def _points(rows: Sequence[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    return [(r["samples"], r[key]) for r in rows if r.get(key) is not None]
