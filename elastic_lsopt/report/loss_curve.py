"""loss.png: training and held-out loss of a run against its samples. Reads metrics.jsonl, nothing else."""

from __future__ import annotations

from collections.abc import Sequence
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
    """Draw the steps' `loss` (faint, and its running mean) and `eval_loss`, with a dashed line at a named reference.

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
        axes.plot(x, running_mean(y), color=TRAINING, linewidth=1.6, label="training (running mean)")
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


def running_mean(values: Sequence[float], keep: float = 0.9) -> list[float]:
    """Exponential mean; its weights sum to one from the first value on, so it has no lag at the start."""
    out: list[float] = []
    total = weight = 0.0
    for value in values:
        total, weight = keep * total + value, keep * weight + 1
        out.append(total / weight)
    return out


def _points(rows: Sequence[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    return [(r["samples"], r[key]) for r in rows if r.get(key) is not None]
