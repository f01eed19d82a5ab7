"""Pictures of the Hessian's spectrum: its density, and its largest eigenvalues over training. Reads a Run, no more."""

from __future__ import annotations

import math
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from elastic_lsopt.report.pictures.style import (
    BLUE,
    CYCLE,
    GREEN,
    GREY,
    MARKERS,
    RED,
    against_samples,
    canvas,
    save,
    tidy,
)
from elastic_lsopt.report.run import EIGENVALUES, LARGEST, Reading, Run, finite, number, numbers

Array = NDArray[np.float64]
BROADENING = 0.01
"""Standard deviation of the Gaussian at each Ritz value, as a share of the spectrum's range."""
MOST_ISOLATED = 10
"""Isolated Ritz values that are marked on each side."""
MOST_CURVES = len(CYCLE)
ASIDE: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0), "frameon": False, "fontsize": 9}
"""A legend beside the axes: eigenvalues and lines leave no corner that is always free."""


def draw_density(run: Run, target: Path) -> str | None:
    """spectral_density.png: the last density with its outliers, and the first beside it.

    density(t) = mean over vectors v of sum_i weight_vi N(t; node_vi, sigma^2), sigma a hundredth of the range. The
    axis ends below a tenth of the peak that one eigenvalue of `dimension` makes.
    """
    reading = run.last("spectral_density")
    ritz = ritz_values(reading)
    if reading is None or not ritz:
        return None
    low, high = min(float(n.min()) for n, _ in ritz), max(float(n.max()) for n, _ in ritz)
    sigma = BROADENING * (high - low or max(abs(high), 1.0))
    grid = np.linspace(low - 4 * sigma, high + 4 * sigma, 2000)
    density = broadened(ritz, grid, sigma)
    size = number(reading.probe.get("dimension"))
    floor = 0.1 / (size * sigma * math.sqrt(2 * math.pi)) if size > 0 else 1e-7 * float(density.max())

    figure = canvas()
    axes = figure.subplots()
    tidy(axes, f"Spectral density of the Hessian {reading.when}{run.whose}")
    axes.fill_between(grid, floor, np.maximum(density, floor), color=BLUE, alpha=0.2, linewidth=0)
    axes.plot(grid, np.maximum(density, floor), color=BLUE, linewidth=1.4, label=reading.when)
    first = next(iter(run.readings("spectral_density")), reading)
    if first.step != reading.step and (before := ritz_values(first)):
        inside = np.maximum(broadened(before, grid, sigma), floor)
        axes.plot(grid, inside, color=GREY, linewidth=1, linestyle="--", label=first.when)
    isolated = isolated_values(ritz, size, sigma)
    if isolated:
        y = [1.6 * max(float(np.interp(x, grid, density)), floor) for x in isolated]
        label = f"isolated Ritz values ({len(isolated)})"
        axes.plot(isolated, y, "v", color=RED, markersize=6, markeredgewidth=0, label=label)
    eigenvalues = _beside(run, reading)
    for i, value in enumerate(eigenvalues):
        label = f"largest eigenvalues ({len(eigenvalues)})" if i == 0 else None
        axes.axvline(value, ymax=0.05, color=GREEN, linewidth=2.5, label=label)
    axes.set_yscale("log")
    axes.set_ylim(floor, 8 * float(density.max()))
    axes.set(xlabel="eigenvalue λ, nats per unit of weight squared", ylabel="share of eigenvalues per unit of λ")
    axes.margins(x=0)
    axes.legend(frameon=False, fontsize=9, loc="upper right" if abs(low) < abs(high) else "upper left")
    save(figure, target)
    return f"Ritz values from {low:.4g} to {high:.4g}; {len(isolated)} isolated, {len(ritz)} random vectors."


def ritz_values(reading: Reading | None) -> list[tuple[Array, Array]]:
    """(nodes ascending, weights that sum to one) of each random vector; vectors that are not finite are left out."""
    found = []
    nodes, weights = (reading.probe.get(key) if reading else None for key in ("nodes", "weights"))
    for one, other in zip(_vectors(nodes), _vectors(weights), strict=False):
        x, w = np.array(numbers(one)), np.array(numbers(other))
        if len(x) and len(x) == len(w) and np.isfinite([x, w]).all() and w.sum() > 0:
            order = np.argsort(x)
            found.append((x[order], w[order] / w.sum()))
    return found


def _vectors(values: Any) -> list[Any]:
    """A list of lists; one flat list is that of a single vector."""
    if not isinstance(values, list):
        return []
    return values if values and isinstance(values[0], list) else [values]


def broadened(ritz: list[tuple[Array, Array]], grid: Array, sigma: float) -> Array:
    """The vectors' mean density on the grid."""
    total = np.zeros_like(grid)
    for nodes, weights in ritz:
        total += (weights * np.exp(-0.5 * ((grid[:, None] - nodes) / sigma) ** 2)).sum(1)
    return total / (len(ritz) * sigma * math.sqrt(2 * math.pi))


def isolated_values(ritz: list[tuple[Array, Array]], size: float, sigma: float) -> list[float]:
    """The eigenvalues that stand apart from the bulk at either end, outermost first.

    Such a Ritz value stands more than 2 sigma from its inner neighbour, all vectors have it within sigma (Lanczos has
    found it, whatever the start), and it weighs no more than ten eigenvalues of `size` do. The first that does not ends
    the search. A lone vector has none to agree with: 5 sigma.
    """
    allowed = 10 / size if size > 0 else 0.01
    apart = (2 if len(ritz) > 1 else 5) * sigma
    found: list[float] = []
    for end in (-1, 0):
        inwards = -1 if end == -1 else 1
        nodes = ritz[0][0][::-1] if end == -1 else ritz[0][0]
        for value, inner in islice(pairwise(nodes), MOST_ISOLATED):
            near = [(w[np.abs(n - value) <= sigma]).sum() for n, w in ritz]
            if (inner - value) * inwards <= apart or not all(w > 0 for w in near) or np.mean(near) > allowed:
                break
            found.append(float(value))
    return found


def _beside(run: Run, reading: Reading) -> list[float]:
    """The largest eigenvalues that another probe found of the same weights."""
    found = run.last(*EIGENVALUES)
    if found is None or found.step != reading.step:
        return []
    return [v for v in found.numbers("eigenvalues") if not math.isnan(v)]


def draw_eigenvalues(run: Run, target: Path) -> str | None:
    """eigenvalues.png: the largest eigenvalues with the line 2/η, and below the sharpness against its threshold."""
    readings, stability = run.readings(*EIGENVALUES), run.readings("edge_of_stability")
    curves = eigenvalue_curves(readings)
    fields = (("sharpness", "largest"), ("threshold",))
    edge = [list(finite((r.samples, _either(r, either)) for r in stability)) for either in fields]
    panels = [bool(curves), bool(edge[0])]
    if not any(panels):
        return None
    figure = canvas(7, 4.2 if sum(panels) == 1 else 6.4)
    drawn = iter(figure.subplots(sum(panels), 1, sharex=True, squeeze=False)[:, 0])
    said, axes = [], None
    if curves:
        axes = next(drawn)
        rates = finite((number(r.get("samples")), number(r.get("lr"))) for r in run.rows)
        line = [(x, 2 / rate) for x, rate in rates if rate > 2 / LARGEST]
        _draw_curves(axes, curves, line, f"Largest eigenvalues of the Hessian, and the stability line 2/η{run.whose}")
        said.append(f"λ₁ = {curves[0][-1][1]:.4g} at the end.")
    if edge[0]:
        axes = next(drawn)
        tidy(axes, "Sharpness that the optimizer sees, and where it would become unstable")
        axes.plot(*zip(*edge[0], strict=True), "o-", color=BLUE, markersize=4, label="sharpness")
        if edge[1]:
            axes.plot(*zip(*edge[1], strict=True), "--", color=RED, linewidth=1.4, label="threshold")
        _spread_scale(axes, [y for points in edge for _, y in points])
        axes.set_ylabel("sharpness, optimizer's scale")
        axes.legend(**ASIDE)
        if not math.isnan(ratio := stability[-1].number("value")):
            said.append(f"Edge-of-stability ratio {ratio:.4g} at the end.")
    against_samples(axes)
    save(figure, target)
    return " ".join(said)


def _either(reading: Reading, fields: tuple[str, ...]) -> float:
    """The first of the fields that is a number."""
    return next((v for field in fields if not math.isnan(v := reading.number(field))), math.nan)


def eigenvalue_curves(readings: list[Reading]) -> list[list[tuple[float, float, float]]]:
    """(samples, eigenvalue, residual) of the largest, the second …; a residual that nobody knows is zero."""
    curves: list[list[tuple[float, float, float]]] = [[] for _ in range(MOST_CURVES)]
    for reading in readings:
        residuals = reading.numbers("residuals")
        for i, value in enumerate(reading.numbers("eigenvalues")[:MOST_CURVES]):
            error = residuals[i] if i < len(residuals) and not math.isnan(residuals[i]) else 0.0
            if not math.isnan(value):
                curves[i].append((reading.samples, value, abs(error)))
    return [curve for curve in curves if curve]


def _draw_curves(
    axes: Any, curves: list[list[tuple[float, float, float]]], line: list[tuple[float, float]], title: str
) -> None:
    tidy(axes, title)
    for i, curve in enumerate(curves):
        x, y, error = zip(*curve, strict=True)
        axes.errorbar(
            x, y, yerr=error, fmt=f"{MARKERS[i]}-", color=CYCLE[i], markersize=4, linewidth=1.4, capsize=2,
            label=f"λ{'₁₂₃₄₅₆'[i]}",
        )  # fmt: skip
    values = [y for curve in curves for _, y, _ in curve]
    if line:
        x, y = zip(*line, strict=True)
        axes.plot(x, y, "--", color=GREY, linewidth=1.4, label="2/η")
    near = [y for _, y in line if y <= 10 * max(abs(v) for v in values)]  # a warm-up begins at 2/0
    _spread_scale(axes, values + (near or [min((y for _, y in line), default=values[0])]))
    axes.set_ylabel("eigenvalue, nats / weight²")
    axes.legend(**ASIDE)


def _spread_scale(axes: Any, values: list[float]) -> None:
    """A log scale where values spread over more than a factor of ten (linear near zero where some are negative)."""
    low, high, size = min(values), max(values), max(abs(v) for v in values)
    if low > 0 and high > 10 * low:
        axes.set_yscale("log")
        axes.set_ylim(low / 1.5, high * 2)
    elif low <= 0 and size > 10 * (near := min((abs(v) for v in values if v), default=size)):
        axes.set_yscale("symlog", linthresh=max(near, 1e-6 * size), linscale=1)
        axes.set_ylim(2 * low if low < 0 else -near, 3 * size if high > 0 else near)
    elif high > low:
        axes.set_ylim(low - 0.08 * (high - low), high + 0.2 * (high - low))
    elif size > 0:
        axes.set_ylim(min(0.0, 1.5 * low), max(0.0, 1.5 * high))
