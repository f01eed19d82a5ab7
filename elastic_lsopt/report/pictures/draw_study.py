"""Pictures of a study: its measures ranked by Kendall's tau, and each against the generalisation gap."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from elastic_lsopt.report.measure_names import measure
from elastic_lsopt.report.pictures.style import BLUE, GREY, RED, canvas, plain, save, short, tidy
from elastic_lsopt.report.run import Run, finite, number, numbers

COLUMNS = 4
SPREAD = 30.0
"""Largest over smallest value from which a measure's axis is logarithmic."""


@dataclass(frozen=True)
class Rank:
    """A measure's rank correlation with the gap; NaN where it has none."""

    name: str
    tau: float
    low: float
    high: float
    models: int | None
    granulated: float
    """Ψ: the mean of tau over groups of models that differ in one setting alone (Jiang et al. 2020)."""
    loss_gap: float
    """Tau with the gap of the losses."""

    @property
    def sure(self) -> bool:
        """Whether the interval leaves zero out."""
        return self.low > 0 or self.high < 0


def ranking(run: Run) -> list[Rank]:
    """The study's measures, the largest tau first; those without one at the end."""
    found = []
    for name, told in ((run.study or {}).get("measures") or {}).items():
        said = told if isinstance(told, dict) else {}
        low, high = (*numbers(said.get("interval")), math.nan, math.nan)[:2]
        models, losses = said.get("models"), said.get("loss_gap")
        found.append(
            Rank(
                name, number(said.get("tau")), low, high, models if isinstance(models, int) else None,
                number(said.get("psi")), number(losses.get("tau")) if isinstance(losses, dict) else math.nan,
            )
        )  # fmt: skip
    return sorted(found, key=lambda rank: (math.isnan(rank.tau), -rank.tau))


def draw_ranking(run: Run, target: Path) -> str | None:
    """ranking.png: each measure's tau with its interval, the largest on top."""
    ranks = [rank for rank in ranking(run) if not math.isnan(rank.tau)]
    if not ranks:
        return None
    figure = canvas(8, 1.4 + 0.3 * len(ranks))
    axes = figure.subplots()
    tidy(axes, "Which measure goes with the generalisation gap?")
    axes.grid(axis="x", alpha=0.25)
    axes.axvline(0, color=GREY, linewidth=1)
    for y, rank in enumerate(ranks):
        colour = BLUE if rank.tau >= 0 else RED
        if not math.isnan(rank.low + rank.high):
            axes.plot([rank.low, rank.high], [y, y], color=colour, linewidth=2, alpha=0.5, solid_capstyle="butt")
        axes.plot(rank.tau, y, "o", markersize=7, color=colour, markerfacecolor=colour if rank.sure else "white")
        edge = rank.tau if math.isnan(rank.high) else rank.high
        axes.annotate(f"{rank.tau:+.2f}", (edge, y), (6, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set_yticks(range(len(ranks)), [plain(measure(rank.name).title, 48) for rank in ranks], fontsize=9)
    axes.set_ylim(len(ranks) - 0.4, -0.6)
    axes.margins(x=0.12)
    counts = sorted({rank.models for rank in ranks if rank.models is not None})
    models = f", {'–'.join(map(str, counts[:: max(1, len(counts) - 1)]))} models" if counts else ""
    axes.set_xlabel(f"Kendall's τ, its interval (hollow: 0 is within){models}")
    save(figure, target)
    return f"Largest: {measure(ranks[0].name).title}, τ = {ranks[0].tau:+.3f}."


def draw_scatter(run: Run, target: Path) -> str | None:
    """study.png: each measure of each model against the model's gap, in the order of the ranking."""
    models = (run.study or {}).get("models")
    models = [model for model in models if isinstance(model, dict)] if isinstance(models, list) else []
    found = {}
    for rank in ranking(run):
        points = list(finite((number(model.get(rank.name)), number(model.get("gap"))) for model in models))
        if len(points) > 1:
            found[rank] = points
    if not found:
        return None
    from matplotlib.ticker import LogLocator, NullFormatter

    columns = min(COLUMNS, len(found))
    lines = -(-len(found) // columns)
    figure = canvas(max(2.6 * columns, 5), 2.4 * lines + 0.5)
    panels = figure.subplots(lines, columns, squeeze=False, sharey=True)
    for axes, (rank, points) in zip(panels.ravel(), found.items(), strict=False):
        shown = measure(rank.name)
        tau = "" if math.isnan(rank.tau) else f" (τ {rank.tau:+.2f})"
        tidy(axes, shown.title + tau, size=9, limit=38)
        x, y = zip(*points, strict=True)
        axes.plot(x, y, "o", color=BLUE, alpha=0.5, markersize=4, markeredgewidth=0)
        if min(x) > 0 and max(x) > SPREAD * min(x):
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(numticks=4))
            axes.xaxis.set_minor_formatter(NullFormatter())
        else:
            axes.xaxis.get_major_locator().set_params(nbins=4)
            axes.xaxis.set_major_formatter(short)
        axes.tick_params(labelsize=8)
    for axes in panels.ravel()[len(found) :]:
        axes.remove()
    figure.suptitle("Each model's measure (across, in its own unit) against its generalisation gap", fontsize=11)
    figure.supylabel("generalisation gap", fontsize=10)
    save(figure, target)
    return f"{len(models)} models."
