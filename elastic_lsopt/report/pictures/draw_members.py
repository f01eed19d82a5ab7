"""members.png: world size, batch, rate and loss of an elastic run against its samples. Reads files, nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

COLOURS = {"world": "#228833", "batch": "#aa3377", "lr": "#ccbb44", "loss": "#4477aa"}  # also for the colour-blind
LABELS = {"world": "workers", "batch": "samples a step", "lr": "learning rate", "loss": "loss"}
LOST, PLANNED = "#ee6677", "#777777"


def draw_members(
    rows: Sequence[dict[str, Any]], changes: Sequence[dict[str, Any]], target: Path, *, title: str
) -> None:
    """Draw the steps of metrics.jsonl as four panels over one axis of samples, a line at each change of members.

    Red lines are changes in which a worker was lost, grey ones joins and planned leaves.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 6.4), layout="constrained")
    panels = figure.subplots(len(COLOURS), 1, sharex=True, height_ratios=[1, 1, 1, 2.2])
    x = [row["samples"] for row in rows]
    for axes, (key, colour) in zip(panels, COLOURS.items(), strict=True):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.25)
        for change in changes[1:]:
            axes.axvline(change["samples"], color=LOST if change["gone"] else PLANNED, linewidth=0.8, linestyle=":")
        y = [row.get(key) for row in rows]
        drawn = [(a, b) for a, b in zip(x, y, strict=True) if b is not None]
        if drawn:
            style = "steps-pre" if key in ("world", "batch") else "default"
            axes.plot(*zip(*drawn, strict=True), color=colour, linewidth=1.4, drawstyle=style)
        axes.set_ylabel(LABELS[key], fontsize=9)
        if key in ("world", "batch") and drawn:
            axes.set_ylim(0, 1.15 * max(value for _, value in drawn))
            axes.yaxis.get_major_locator().set_params(integer=True, nbins=4)
    panels[0].set_title(title, loc="left", fontsize=11)
    panels[-1].set_xlabel("samples (dotted: a change of members; red: a worker was lost)")
    panels[-1].xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    panels[-1].margins(x=0.02)
    figure.savefig(target, dpi=150)
