"""Pictures over training: the flatness measures side by side, and the gradient's noise. Reads a Run, nothing else."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from elastic_lsopt.report.measure_names import SPECIAL, measure
from elastic_lsopt.report.pictures.style import (
    BLUE,
    GREEN,
    GREY,
    RED,
    against_samples,
    canvas,
    plain,
    save,
    short,
    tidy,
)
from elastic_lsopt.report.run import Reading, Run, finite, number

COLUMNS = 3
Point = tuple[float, float, float]


def draw_measures(run: Run, target: Path) -> str | None:
    """measures.png: a panel for each measure that was taken at least twice, with a band of one standard error."""
    found = {name: points for name in measured(run) if len(points := with_errors(run.readings(name), "value")) > 1}
    if not found:
        return None
    lines = -(-len(found) // COLUMNS)
    columns = min(COLUMNS, len(found))
    figure = canvas(max(3.4 * columns, 5), 2.3 * lines + 0.5)
    panels = figure.subplots(lines, columns, squeeze=False).ravel()
    for axes, (name, points) in zip(panels, found.items(), strict=False):
        shown = measure(name, run.measures.get(name))
        tidy(axes, shown.title, size=10, limit=32)
        draw_with_band(axes, points, BLUE)
        axes.set_ylabel(plain(shown.unit or "value", 40), fontsize=9)
        axes.tick_params(labelsize=8)
        against_samples(axes)
        axes.xaxis.label.set_size(8)
        axes.xaxis.get_major_locator().set_params(nbins=4)
    for axes in panels[len(found) :]:
        axes.remove()
    figure.suptitle("Measures of flatness over training; bands: one standard error", fontsize=11)
    save(figure, target)
    titles = {name: measure(name, run.measures.get(name)).title for name in found}
    return f"At the end: {', '.join(f'{titles[name]} {points[-1][1]:.4g}' for name, points in found.items())}."


def measured(run: Run) -> list[str]:
    """The probes that give one value and have no picture of their own."""
    names = [name for name in run.names() if run.measure_of(name) not in SPECIAL]
    return [name for name in names if any(not math.isnan(r.number("value")) for r in run.readings(name))]


def with_errors(readings: Sequence[Reading], field: str) -> list[Point]:
    """(samples, value, standard error) of each reading that is a number; an error that nobody knows is zero."""
    return [
        (r.samples, value, 0.0 if math.isnan(error := r.number("standard_error")) else abs(error))
        for r in readings
        if not math.isnan(value := r.number(field))
    ]


def draw_with_band(axes: Any, points: Sequence[Point], colour: str, label: str | None = None) -> None:
    """The values with a band of one standard error on each side, where there is one."""
    x, y, error = zip(*points, strict=True)
    axes.plot(x, y, "o-", color=colour, markersize=3, linewidth=1.5, label=label)
    if any(error):
        low, high = ([v + side * e for v, e in zip(y, error, strict=True)] for side in (-1, 1))
        axes.fill_between(x, low, high, color=colour, alpha=0.25, linewidth=0)


def draw_noise(run: Run, target: Path) -> str | None:
    """noise_scale.png: the noise scale and the critical batch against the batch that the run used."""
    readings = run.readings("noise_scale")
    points = [p for p in with_errors(readings, "value") if p[1] > 0]
    if not points:
        return None
    figure = canvas()
    axes = figure.subplots()
    tidy(axes, "Gradient noise scale, and the batch of the run")
    floor = 0.1 * min(y for _, y, _ in points)  # a band that reaches below zero ends here on the log scale
    draw_with_band(axes, [(x, y, min(e, y - floor)) for x, y, e in points], BLUE, "noise scale tr Σ / |G|²")
    critical = [(x, y) for x, y in finite((r.samples, r.number("critical_batch")) for r in readings) if y > 0]
    if critical:
        axes.plot(*zip(*critical, strict=True), "s--", color=GREEN, markersize=4, label="critical batch")
    batch = [(x, size) for x, size in finite((number(r.get("samples")), number(r.get("batch"))) for r in run.rows)]
    if batch:
        axes.plot(*zip(*batch, strict=True), color=RED, linewidth=1.8, drawstyle="steps-pre", label="batch used")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(short)
    axes.yaxis.set_minor_formatter(lambda value, _: "")
    axes.set_ylabel("samples a step")
    against_samples(axes)
    axes.legend(frameon=False, fontsize=9)
    save(figure, target)
    last = batch[-1][1] if batch else math.nan
    against = "" if math.isnan(last) else f", the batch used {last:,.0f}"
    return f"Noise scale {points[-1][1]:.4g} samples at the end{against}."


def draw_spent(run: Run, target: Path) -> str | None:
    """probe_seconds.png: what the probes have cost, beside the steps."""
    spent: dict[str, float] = {}
    for name in run.names():
        seconds = [s for r in run.readings(name) if not math.isnan(s := r.number("seconds"))]
        if seconds:
            spent[name] = sum(seconds)
    if not spent:
        return None
    steps = sum(s for row in run.rows if not math.isnan(s := number(row.get("seconds"))))
    names = sorted(spent, key=lambda name: spent[name])
    figure = canvas(7, 1.3 + 0.28 * (len(names) + 1))
    axes = figure.subplots()
    tidy(axes, "Seconds spent on probes" + (" and on training steps" if steps else ""))
    axes.grid(axis="x", alpha=0.25)
    axes.grid(axis="y", visible=False)
    shown = [(measure(name, run.measures.get(name)).title, spent[name], BLUE) for name in names]
    shown += [("training steps", steps, GREY)] if steps else []
    labels, values, colours = zip(*shown, strict=True)
    bars = axes.barh([plain(label, 40) for label in labels], values, color=colours)
    axes.bar_label(bars, fmt="%.3g", padding=3, fontsize=8)
    axes.set_xlabel("seconds, whole run")
    axes.margins(x=0.1)
    save(figure, target)
    return f"Probes {sum(spent.values()):.4g} s" + (f", steps {steps:.4g} s." if steps else ".")
