"""The picture of a comparison: each method's mean over seeds with its interval, along an axis of numbers if any."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from elastic_lsopt.report.pictures.style import CYCLE, MARKERS, canvas, plain, save, tidy
from elastic_lsopt.report.run import Run, number

TITLES = {
    "eval_loss": "held-out loss, nats", "eval_accuracy": "held-out accuracy", "steps_to_target": "steps to the target",
    "samples_to_target": "samples to the target",
}  # fmt: skip
MOST_MEASURES = 2
SPREAD = 20.0
"""Largest over smallest value from which an axis is logarithmic."""
DODGE = 0.012
"""Between the methods' marks, as a share of the axis: intervals do not lie on each other."""
ROOM = 1.6
"""Below the least and above the largest mean, where an axis is logarithmic."""
ASIDE = 0.2
"""From the last number of an axis to a label that is none, as a share of the axis."""
LABEL_INCHES, LINE_INCHES = 0.065, 0.55
"""Of the legend: a letter of a label, and the line before it."""
Row = dict[str, Any]


def draw_comparison(run: Run, target: Path) -> str | None:
    """comparison.png: a line of panels per quantity, a column per point of the axes that are not along x."""
    told = run.comparison or {}
    rows = [row for row in told.get("rows") or [] if isinstance(row, dict) and isinstance(row.get("numbers"), dict)]
    axes = [str(axis) for axis in told.get("axes") or []]
    shown = _quantities(rows, (told.get("settings") or {}).get("measures") or [])
    if not rows or not shown:
        return None
    along = _along(rows, axes)
    if len({row.get("equal") for row in rows}) > 1:
        axes = [*axes, "equal"]
    panels = list(dict.fromkeys(_panel(row, axes, along) for row in rows))
    methods = list(dict.fromkeys(str(row["method"]) for row in rows))
    tall = 2.9 if along else max(2.4, 0.9 + 0.28 * len(methods))
    wide = max(6.5, 3.3 * len(panels))
    figure = canvas(wide, tall * len(shown) + 0.8)
    grid = figure.subplots(len(shown), len(panels), squeeze=False, sharey="row" if along else False)
    for line, name in zip(grid, shown, strict=True):
        for at, panel in zip(line, panels, strict=True):
            tidy(at, panel or TITLES.get(name, name), size=9, limit=46)
            own = [row for row in rows if _panel(row, axes, along) == panel]
            _curves(at, own, methods, along, name) if along else _marks(at, own, methods, name)
        (line[0].set_ylabel if along else line[0].set_xlabel)(plain(TITLES.get(name, name), 40), fontsize=9)
    if along:
        handles, labels = grid[0][0].get_legend_handles_labels()
        columns = max(1, min(len(labels), int(wide / (LABEL_INCHES * max(map(len, labels)) + LINE_INCHES))))
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=8, frameon=False)
    save(figure, target)
    runs, failed = (sum(int(number(row.get(key))) for row in rows) for key in ("runs", "failed"))
    share = number(told.get("confidence"))
    lost = f", {failed} of them without numbers" if failed else ""
    bars = f"bars: {share:.0%} intervals over seeds (Student's t); open: of some seeds alone."
    return f"{len(methods)} methods, {runs} runs{lost}; {bars}"


def _quantities(rows: Sequence[Row], measures: Sequence[str]) -> list[str]:
    """What is drawn: steps and samples to the target, else accuracy, else loss; and the first measures."""
    known = {name for row in rows for name, told in row["numbers"].items() if told.get("mean") is not None}
    first = next((name for name in ("steps_to_target", "eval_accuracy", "eval_loss") if name in known), None)
    more = ["samples_to_target"] if first == "steps_to_target" else []
    return [*([first, *more] if first else []), *[m for m in measures if m in known][:MOST_MEASURES]]


def _along(rows: Sequence[Row], axes: Sequence[str]) -> str | None:
    """The axis with the most values that are numbers, two or more, and all but one of its values at least."""
    values = {axis: {row.get(axis) for row in rows} for axis in axes}
    numeric = {axis: sum(not math.isnan(number(x)) for x in v) for axis, v in values.items()}
    found = {axis: n for axis, n in numeric.items() if n > 1 and n >= len(values[axis]) - 1}
    return max(found, key=lambda axis: found[axis], default=None)


def _panel(row: Row, axes: Sequence[str], along: str | None) -> str:
    return ", ".join(f"{axis.rpartition('.')[2]} {row.get(axis)}".replace("_", " ") for axis in axes if axis != along)


def _curves(at: Any, rows: Sequence[Row], methods: Sequence[str], along: str, name: str) -> None:
    xs = sorted({x for row in rows if not math.isnan(x := number(row[along]))})
    logarithmic = xs[0] > 0 and xs[-1] > SPREAD * xs[0]
    words = list(dict.fromkeys(str(row[along]) for row in rows if math.isnan(number(row[along]))))
    aside = [xs[-1] * (xs[-1] / xs[0]) ** ASIDE if logarithmic else xs[-1] + ASIDE * (xs[-1] - xs[0]) for _ in words]
    place = {str(x): x for x in xs} | dict(zip(words, aside, strict=True))
    for i, method in enumerate(methods):
        points = [
            (place.get(str(r[along]), number(r[along])), *_number(r, name), _of_all(r, name))
            for r in rows if r["method"] == method
        ]  # fmt: skip
        points = sorted(point for point in points if not math.isnan(point[1]))
        shift = DODGE * (i - (len(methods) - 1) / 2)
        wide = (xs[-1] / xs[0]) ** shift if logarithmic else shift * (xs[-1] - xs[0])
        x = [p[0] * wide if logarithmic else p[0] + wide for p in points]
        at.errorbar(
            x, [p[1] for p in points], yerr=[[p[1] - p[2] for p in points], [p[3] - p[1] for p in points]],
            color=CYCLE[i % len(CYCLE)], marker=MARKERS[i % len(MARKERS)], markersize=4, elinewidth=0.9, capsize=2,
            linestyle="",
        )  # fmt: skip
        line = [(x, p[1]) for x, p in zip(x, points, strict=True) if p[0] <= xs[-1]]  # not to what is no number
        at.plot(
            [x for x, _ in line], [y for _, y in line], label=plain(method, 30), color=CYCLE[i % len(CYCLE)],
            marker=MARKERS[i % len(MARKERS)], markersize=4, linewidth=1.2, linestyle="-" if i < len(CYCLE) else "--",
        )  # fmt: skip
        at.plot(  # open: some runs have no such number
            [x for x, p in zip(x, points, strict=True) if not p[4]], [p[1] for p in points if not p[4]], linestyle="",
            marker=MARKERS[i % len(MARKERS)], markersize=4, color=CYCLE[i % len(CYCLE)], markerfacecolor="white",
            zorder=3,
        )  # fmt: skip
    if logarithmic:
        at.set_xscale("log", base=2)
    at.set_xticks([*xs, *aside], [*(f"{x:,g}" for x in xs), *(plain(word, 12) for word in words)])
    at.minorticks_off()
    at.set_xlabel(plain(along.replace("_", " "), 40), fontsize=9)
    at.tick_params(which="both", labelsize=8)
    values = [v for r in rows if not math.isnan(v := _number(r, name)[0])]
    counted = name.endswith("_to_target")
    if values and min(values) > 0 and (counted or max(values) > SPREAD * min(values)):
        at.set_yscale("log")
        at.set_ylim(min(values) / ROOM, max(values) * ROOM)  # an interval may reach below what a logarithm shows


def _marks(at: Any, rows: Sequence[Row], methods: Sequence[str], name: str) -> None:
    for row in rows:
        mean, low, high = _number(row, name)
        i = methods.index(str(row["method"]))
        if not math.isnan(mean):
            color, filled = CYCLE[i % len(CYCLE)], _of_all(row, name)
            at.errorbar(
                mean, i, xerr=[[mean - low], [high - mean]], fmt="o", color=color, capsize=3,
                markerfacecolor=color if filled else "white",
            )  # fmt: skip
    at.set_yticks(range(len(methods)), [plain(method, 30) for method in methods], fontsize=8)
    at.set_ylim(len(methods) - 0.5, -0.5)
    at.grid(axis="x", alpha=0.25)
    at.tick_params(axis="x", labelsize=8)


def _of_all(row: Row, name: str) -> bool:
    """Whether each run of the row has the number."""
    return number((row["numbers"].get(name) or {}).get("n")) >= number(row.get("runs"))


def _number(row: Row, name: str) -> tuple[float, float, float]:
    """The mean and the ends of its interval, the mean itself where it has none."""
    told = row["numbers"].get(name) or {}
    mean = number(told.get("mean"))
    ends = [number(told.get(key)) for key in ("low", "high")]
    return (mean, *(mean if math.isnan(end) else end for end in ends))  # type: ignore[return-value]
