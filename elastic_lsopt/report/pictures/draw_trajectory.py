"""Pictures of how the weights move: angles, distances, alignment, update against weight. Reads a Run, no more."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from elastic_lsopt.report.pictures.style import (
    BLUE,
    CYCLE,
    GREY,
    MAP,
    MARKERS,
    PURPLE,
    RED,
    against_samples,
    canvas,
    plain,
    save,
    tidy,
)
from elastic_lsopt.report.run import Reading, Run, finite, number, numbers

MOST_ROWS = 48
"""Rows of the heat map; more parameters are taken together by module."""


def draw_motion(run: Run, target: Path) -> str | None:
    """trajectory.png: the angle between consecutive updates, its velocity, and how far the weights have come."""
    readings = run.readings("trajectory")
    angle = _curve(readings, "angle", math.degrees)
    if not angle:
        angle = _curve(readings, "cosine", lambda c: math.degrees(math.acos(min(1.0, max(-1.0, c)))))
    velocity = _curve(readings, "angular_velocity")
    away, path = _curve(readings, "distance_from_start"), _curve(readings, "path_length")
    panels = [bool(angle), bool(velocity), bool(away or path)]
    if not any(panels):
        return None
    from matplotlib.ticker import MultipleLocator

    figure = canvas(7, 1 + 2.1 * sum(panels))
    drawn = iter(figure.subplots(sum(panels), 1, sharex=True, squeeze=False)[:, 0])
    axes = None
    if angle:
        axes = next(drawn)
        tidy(axes, "Angle between consecutive updates (dashed: a right angle)")
        axes.plot(*zip(*angle, strict=True), color=BLUE, linewidth=1.4, **_marks(angle))
        axes.axhline(90, color=GREY, linestyle="--", linewidth=1)
        axes.set_ylabel("degrees")
        spread = max(y for _, y in angle) - min(y for _, y in angle)
        axes.yaxis.set_major_locator(MultipleLocator(next((d for d in (1, 5, 15, 30) if spread <= 6 * d), 45)))
    if velocity:
        axes = next(drawn)
        tidy(axes, "Angular velocity of the updates")
        axes.plot(*zip(*velocity, strict=True), color=PURPLE, linewidth=1.4, **_marks(velocity))
        axes.set_ylabel("radians a sample")
    if away or path:
        axes = next(drawn)
        tidy(axes, "How far the weights have come")
        for points, name, colour, line in (
            (path, "length of the path", RED, "--"),
            (away, "from the start", BLUE, "-"),
        ):
            if points:
                axes.plot(*zip(*points, strict=True), line, color=colour, linewidth=1.6, label=name, **_marks(points))
        axes.set_ylabel("L2 norm, weight units")
        axes.legend(frameon=False, fontsize=9)
    against_samples(axes)
    save(figure, target)
    ends = [(angle, "angle {:.3g}°"), (away, "distance from the start {:.4g}"), (path, "path length {:.4g}")]
    return "At the end: " + ", ".join(text.format(points[-1][1]) for points, text in ends if points) + "."


def draw_alignment(run: Run, target: Path) -> str | None:
    """alignment.png: the cosine of gradient and update with each of the top eigenvectors, without its sign."""
    found = {what: curves for what, curves in _alignments(run.readings("trajectory")).items() if any(curves)}
    if not found:
        return None
    figure = canvas(7, 0.9 + 2.6 * len(found))
    panels = figure.subplots(len(found), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (what, curves) in zip(panels, found.items(), strict=True):
        tidy(axes, f"Alignment of the {what} with the top eigenvectors")
        for i, points in enumerate(curves[: len(CYCLE)]):
            if points:
                axes.plot(
                    *zip(*points, strict=True), f"{MARKERS[i]}-", color=CYCLE[i], markersize=4, linewidth=1.4,
                    label=f"eigenvector {i + 1}",
                )  # fmt: skip
        axes.set(ylabel="|cosine|", ylim=(0, 1.02))
        axes.legend(frameon=False, fontsize=9, ncols=3)
    against_samples(panels[-1])
    save(figure, target)
    return ""


def _alignments(readings: Sequence[Reading]) -> dict[str, list[list[tuple[float, float]]]]:
    """What is aligned -> a curve for each eigenvector.

    `alignment` is a list of cosines (of the update) or one of each by name; or `update_alignment` and
    `gradient_alignment` hold them, as {"cosines": […]}.
    """
    found: dict[str, list[list[tuple[float, float]]]] = {}
    for reading in readings:
        told = reading.probe.get("alignment")
        by_name = dict(told) if isinstance(told, dict) else {"update": told}
        for what in ("update", "gradient"):
            by_name[what] = by_name.get(what) or reading.probe.get(f"{what}_alignment")
        for what, said in by_name.items():
            for i, value in enumerate(numbers(said.get("cosines") if isinstance(said, dict) else said)):
                curves = found.setdefault(str(what), [])
                curves.extend([] for _ in range(i + 1 - len(curves)))
                if not math.isnan(value):
                    curves[i].append((reading.samples, abs(value)))
    return found


def draw_ratios(run: Run, target: Path) -> str | None:
    """update_to_weight.png: |update| / |weight| of each parameter over training, as a heat map on a log scale."""
    from matplotlib.colors import LogNorm

    readings = [r for r in run.readings("trajectory") if isinstance(r.probe.get("update_to_weight"), dict)]
    table = by_module([{k: number(v) for k, v in r.probe["update_to_weight"].items()} for r in readings])
    z = np.array(list(table.values()))
    good = z[np.isfinite(z) & (z > 0)] if z.size else z
    if good.size == 0:
        return None
    low, high = max(float(good.min()), 1e-12), float(good.max())
    norm = LogNorm(low, high if high > low * 1.01 else low * 1.5)
    names = list(table)
    figure = canvas(7.6, 1.5 + max(0.17 * len(names), 1.2))
    axes = figure.subplots()
    tidy(axes, "Size of an update relative to the weights")
    axes.grid(visible=False)
    edges = _edges([r.samples for r in readings])
    axes.set_facecolor("#dddddd")  # what shows through is zero, or not known
    image = axes.pcolormesh(edges, np.arange(len(names) + 1), np.ma.masked_where(~(z > 0), z), cmap=MAP, norm=norm)
    axes.set_yticks(np.arange(len(names)) + 0.5, [plain(name, 44) for name in names], fontsize=7)
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    against_samples(axes)
    axes.margins(x=0)
    figure.colorbar(image, ax=axes, label="|update| / |weight|", aspect=30)
    save(figure, target)
    return f"Ratios from {low:.3g} to {high:.3g}, of {len(names)} parameters or modules."


def by_module(readings: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    """Name -> its ratio in each reading, in the model's order; at most MOST_ROWS.

    Where there are more parameters the names lose their last part, the ratios of one module are one (their geometric
    mean), until they are few enough. Where that leaves next to nothing (a model of 96 layers), every n-th stands for
    its neighbours.
    """
    names = list(dict.fromkeys(name for reading in readings for name in reading))
    shown = {name: name for name in names}
    while len(set(shown.values())) > MOST_ROWS and any("." in s for s in shown.values()):
        depth = max(s.count(".") for s in shown.values())
        shorter = {name: s.rpartition(".")[0] if s.count(".") == depth else s for name, s in shown.items()}
        if len(set(shorter.values())) < MOST_ROWS / 8:
            break
        shown = shorter
    rows = list(dict.fromkeys(shown.values()))
    every = -(-len(rows) // MOST_ROWS)
    members = {row: [name for name in names if shown[name] == row] for row in rows[:: every or 1]}
    return {row: [_geometric([r.get(n, math.nan) for n in own]) for r in readings] for row, own in members.items()}


def _geometric(values: Sequence[float]) -> float:
    positive = [v for v in values if v > 0]  # NaN is not
    if len(positive) == 1:
        return positive[0]
    return math.exp(sum(map(math.log, positive)) / len(positive)) if positive else math.nan


def _edges(centres: Sequence[float]) -> list[float]:
    """The borders of the cells around these samples."""
    if len(centres) == 1:
        return [centres[0] - 0.5, centres[0] + 0.5]
    inner = [(a + b) / 2 for a, b in pairwise(centres)]
    return [2 * centres[0] - inner[0], *inner, 2 * centres[-1] - inner[-1]]


def _curve(readings: Sequence[Reading], field: str, as_shown: Any = float) -> list[tuple[float, float]]:
    points = finite((r.samples, r.number(field)) for r in readings)
    return [(x, as_shown(y)) for x, y in points]


def _marks(points: Sequence[object]) -> dict[str, Any]:
    """Dots where they are few enough to be told apart."""
    return {"marker": "o", "markersize": 3.5} if len(points) <= 40 else {}
