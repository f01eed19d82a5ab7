"""Pictures of the loss surface: slices along one or two directions, paths between two models. Reads a Run, no more."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from elastic_lsopt.report.pictures.style import BLUE, MAP, RED, canvas, plain, save, tidy
from elastic_lsopt.report.run import Reading, Run, finite, numbers

Array = NDArray[np.float64]
UNITS = {
    "random": ("random direction", "1: the size of the weights"),
    "eigenvectors": ("eigenvector", "of the Hessian"),
    "principal components": ("principal component", "of the trajectory"),
}
SPREAD = 20.0
"""Largest over smallest loss from which the levels grow by a factor instead of a step."""


def draw_surface(run: Run, target: Path) -> str | None:
    """surface.png: the loss over the slice that was taken last; losses[j][i] lies at alphas[i], betas[j].

    A line has one beta or none, and its losses are flat or one row.
    """
    reading = run.last("surface")
    if reading is None:
        return None
    alphas, betas = reading.numbers("alphas"), reading.numbers("betas")
    when = reading.when + run.whose
    if len(betas) > 1:
        return _draw_plane(reading, alphas, betas, target, when)
    return _draw_line(reading, alphas, target, when)


def _draw_plane(reading: Reading, alphas: list[float], betas: list[float], target: Path, when: str) -> str | None:
    losses = reading.probe.get("losses")
    rows = [numbers(row) for row in losses] if isinstance(losses, list) else []
    if len(alphas) < 2 or len(rows) != len(betas) or any(len(row) != len(alphas) for row in rows):
        return None
    z = np.ma.masked_invalid(np.array(rows))
    if z.count() == 0:
        return None
    from matplotlib.patheffects import Normal, Stroke

    figure = canvas(6.6, 5.2)
    axes = figure.subplots()
    tidy(axes, f"Loss around the weights {when}")
    axes.grid(visible=False)
    axes.set_facecolor("#dddddd")  # what shows through is not finite
    levels = contour_levels(float(z.min()), float(z.max()))
    filled = axes.contourf(alphas, betas, z, levels=levels, cmap=MAP, norm=_norm(levels))
    axes.contour(alphas, betas, z, levels=levels, colors="white", linewidths=0.4, alpha=0.6)
    figure.colorbar(filled, ax=axes, label="loss, nats", ticks=levels[::4], format=lambda v, _: f"{v:.3g}")
    path = _path(reading)
    if path:
        x, y = zip(*path, strict=True)
        axes.plot(
            x, y, "o-", color="white", linewidth=1.2, markersize=3.5, markeredgecolor="black", label="trajectory",
            path_effects=[Stroke(linewidth=2.8, foreground="black"), Normal()],
        )  # fmt: skip
        axes.plot(*path[0], "s", color="white", markersize=8, markeredgecolor="black", label="its first point")
    if min(alphas) <= 0 <= max(alphas) and min(betas) <= 0 <= max(betas):
        axes.plot(0, 0, "*", color=RED, markersize=15, markeredgecolor="black", label="these weights")
    kind, unit = _units(reading)
    axes.set(xlabel=f"α along the first {kind} ({unit})", ylabel=f"β along the second {kind}")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    save(figure, target)
    return _words(reading, float(z.min()), float(z.max()))


def _draw_line(reading: Reading, alphas: list[float], target: Path, when: str) -> str | None:
    losses = reading.probe.get("losses")
    flat = losses[0] if isinstance(losses, list) and losses and isinstance(losses[0], list) else losses
    points = list(finite(zip(alphas, numbers(flat), strict=False)))
    if len(points) < 2:
        return None
    figure = canvas()
    axes = figure.subplots()
    tidy(axes, f"Loss along a line through the weights {when}")
    x, y = zip(*points, strict=True)
    axes.plot(x, y, "o-", color=BLUE, markersize=3.5, linewidth=1.6)
    if not math.isnan(centre := reading.number("centre")):
        axes.plot(0, centre, "*", color=RED, markersize=15, markeredgecolor="black", label="these weights")
        axes.legend(frameon=False)
    if min(y) > 0 and max(y) > SPREAD * min(y):
        axes.set_yscale("log")
    kind, unit = _units(reading)
    axes.set(xlabel=f"α along the {kind} ({unit})", ylabel="loss, nats")
    axes.margins(x=0.02)
    save(figure, target)
    return _words(reading, min(y), max(y))


def contour_levels(low: float, high: float, count: int = 20) -> Array:
    """Levels from low to high, by a factor where they spread, apart even where the surface is flat."""
    if high - low <= 1e-12 * max(abs(low), abs(high)):
        pad = 0.5 * max(abs(high), 1.0) * 1e-3
        return np.linspace(low - pad, high + pad, count + 1)
    if low > 0 and high > SPREAD * low:
        levels = np.geomspace(low, high, count + 1)
    else:
        levels = np.linspace(low, high, count + 1)
    levels[0], levels[-1] = low, high  # a rounding must not leave a hole at the minimum
    return levels


def _norm(levels: Array) -> Any:
    """A colour a level, evenly."""
    from matplotlib.colors import BoundaryNorm

    return BoundaryNorm(levels, ncolors=256)


def _path(reading: Reading) -> list[tuple[float, float]]:
    path = reading.probe.get("path")
    pairs = [numbers(point) for point in path] if isinstance(path, list) else []
    return list(finite((pair[0], pair[1]) for pair in pairs if len(pair) == 2))


def _units(reading: Reading) -> tuple[str, str]:
    named = str(reading.probe.get("directions") or reading.probe.get("kind") or "")
    return UNITS.get(named, (plain(named, 40) or "direction", "in units of its length"))


def _words(reading: Reading, low: float, high: float) -> str:
    centre = reading.number("centre")
    at = "" if math.isnan(centre) else f"{centre:.4g} at these weights, "
    return f"Loss {at}from {low:.4g} to {high:.4g} on the slice."


def draw_connectivity(run: Run, target: Path) -> str | None:
    """mode_connectivity.png: the loss along the straight line and the curve between two models."""
    reading = run.last("mode_connectivity")
    if reading is None:
        return None
    ts = reading.numbers("ts") or reading.numbers("times")
    line, curve = (reading.numbers(field) for field in ("line", "curve"))
    if losses := reading.numbers("losses"):  # of one way alone, which `curve` names
        line, curve = (losses, []) if reading.probe.get("curve") == "line" else ([], losses)
    line, curve = (list(finite(zip(ts, losses, strict=False))) for losses in (line, curve))
    if max(len(line), len(curve)) < 2:
        return None
    figure = canvas()
    axes = figure.subplots()
    tidy(axes, "Loss on the way between two models")
    for points, name, colour, style in ((line, "straight line", RED, "s--"), (curve, "trained curve", BLUE, "o-")):
        if points:
            x, y = zip(*points, strict=True)
            axes.plot(x, y, style, color=colour, markersize=4, linewidth=1.6, label=name)
    axes.set(xlabel="t: 0 is the one model, 1 the other", ylabel="loss, nats")
    axes.legend(frameon=False)
    save(figure, target)
    barrier = reading.number("barrier")
    return "" if math.isnan(barrier) else f"Barrier height {barrier:.4g} nats."
