"""The picture of a simulation: goodput against the number of replicas, and what the rest went to at the largest."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from elastic_lsopt.report.pictures import style
from elastic_lsopt.report.pictures.style import canvas, save, short, tidy
from elastic_lsopt.simulation.outcome import Outcome

COLOURS = {"synchronous": style.RED, "elastic": style.YELLOW, "consensus": style.BLUE}
LOSSES = {
    "exchange": ("exchanges", style.CYAN), "waiting": ("waiting for others", style.GREY),
    "stopped": ("stopped", style.RED), "saving": ("checkpoints", style.PURPLE), "lost": ("lost work", style.YELLOW),
    "away": ("not there", style.GREEN),
}  # fmt: skip
"""What a loss is called in tables and pictures."""


def draw(told: Sequence[Sequence[Outcome]], target: Path, title: str) -> None:
    """Write the picture: a row of `told` for each number of replicas, an outcome of each mode in it."""
    figure = canvas(9.5, 4.2)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    for outcomes, marker in zip(zip(*told, strict=True), style.MARKERS, strict=False):
        x, y = [o.replicas for o in outcomes], [100 * o.goodput for o in outcomes]
        left.plot(x, y, marker=marker, color=COLOURS[outcomes[0].mode], label=outcomes[0].mode)
    tidy(left, title, size=10, limit=80)
    left.set(xscale="log", xlabel="replicas", ylabel="goodput, %", ylim=(0, 102))
    left.xaxis.set_major_formatter(short)
    left.legend(frameon=False, loc="lower left")
    last = told[-1]
    begin = [0.0] * len(last)
    for name, (said, colour) in LOSSES.items():
        shares = [100 * max(0.0, outcome.losses[name]) for outcome in last]
        if max(shares) >= 0.05:
            right.barh([o.mode for o in last], shares, left=begin, color=colour, label=said)
            begin = [b + share for b, share in zip(begin, shares, strict=True)]
    tidy(right, f"where the rest goes, {last[0].replicas:,} replicas", size=10, limit=60)
    right.grid(visible=False)
    right.set(xlabel="% of the time", xlim=(0, 100))
    right.invert_yaxis()
    if right.get_legend_handles_labels()[0]:
        right.legend(frameon=False, fontsize=8)
    save(figure, target)
