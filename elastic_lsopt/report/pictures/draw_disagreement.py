"""disagreement.png: how far replicas are apart at each exchange, beside their losses. Reads a Run, nothing else."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from elastic_lsopt.report.pictures.draw_loss_curve import smoothed
from elastic_lsopt.report.pictures.style import (
    BLUE,
    CYCLE,
    GREEN,
    GREY,
    PURPLE,
    RED,
    against_samples,
    canvas,
    save,
    tidy,
)
from elastic_lsopt.report.run import EIGENVALUES, Run, finite, number, numbers

Points = list[tuple[float, float]]
Rows = Sequence[Mapping[str, Any]]


def draw_disagreement(run: Run, target: Path) -> str | None:
    """Three panels over one axis of samples: losses, distances, and shares in the span of the differences."""
    everyones = [run.rows, *run.replicas.values()]
    told = exchanges(everyones)
    distance, width = _curve(told, "consensus_distance"), _curve(told, "valley_width")
    if not distance:
        return None
    shares = [points for rows in everyones if (points := _positive(_curve(exchanges([rows]), "gradient_share")))]
    spans = _positive(_beside(run, "span_share"))
    figure = canvas(7, 5.0 + 2.2 * bool(shares or spans))
    panels = figure.subplots(2 + bool(shares or spans), 1, sharex=True)
    _losses(panels[0], everyones)
    _distances(panels[1], told, distance, width)
    if shares or spans:
        chance = _positive(_curve(exchanges([run.rows]), "gradient_share_by_chance"))
        _shares(panels[2], shares, chance, spans)
    for axes in panels:
        for meeting in run.meetings:
            if not math.isnan(at := number(meeting.get("samples"))):
                axes.axvline(at, color=RED, linewidth=0.8, linestyle=":")
    against_samples(panels[-1])
    if run.meetings:
        panels[-1].set_xlabel("samples seen in training (dotted: an exchange out of the ordinary)")
    save(figure, target)
    return _words(told, distance, width)


def exchanges(everyones: Sequence[Rows]) -> list[tuple[float, Mapping[str, Any]]]:
    """(samples, exchange) of each exchange that one of them tells of, in order.

    All who were at it tell the same distance to the last bit; the number alone may come again in a later life of the
    job.
    """
    found: dict[Any, tuple[float, Mapping[str, Any]]] = {}
    for rows in everyones:
        for row in rows:
            exchange, at = row.get("exchange"), number(row.get("samples"))
            if isinstance(exchange, Mapping) and not math.isnan(at):
                key = str((exchange.get("number"), exchange.get("consensus_distance")))
                found.setdefault(key, (at, exchange))
    return sorted(found.values(), key=lambda each: each[0])


def _curve(told: Sequence[tuple[float, Mapping[str, Any]]], key: str) -> Points:
    return list(finite((at, number(exchange.get(key))) for at, exchange in told))


def _positive(points: Points) -> Points:
    """What has a place on an axis of logarithms."""
    return [(x, y) for x, y in points if y > 0]


def _beside(run: Run, key: str) -> Points:
    """What the eigenvalues' probe has told of the span."""
    told = [(r.samples, r.probe.get("disagreement")) for r in run.readings(*EIGENVALUES)]
    return list(finite((x, number(d.get(key))) for x, d in told if isinstance(d, Mapping)))


def _losses(axes: Any, everyones: Sequence[Rows]) -> None:
    tidy(axes, "Training loss of each replica, smoothed; dots: held out")
    for i, rows in enumerate(everyones):
        colour = CYCLE[i % len(CYCLE)]
        if points := list(finite((number(r.get("samples")), number(r.get("loss"))) for r in rows)):
            x, y = zip(*points, strict=True)
            axes.plot(x, smoothed(y), color=colour, linewidth=1.0)
        if points := list(finite((number(r.get("samples")), number(r.get("eval_loss"))) for r in rows)):
            axes.plot(*zip(*points, strict=True), "o", color=colour, markersize=4)
    axes.set_ylabel("loss, nats")


def _distances(axes: Any, told: Sequence[tuple[float, Mapping[str, Any]]], distance: Points, width: Points) -> None:
    tidy(axes, "Distance of the replicas from their mean; faint: of each")
    of_each: dict[str, Points] = {}
    for at, exchange in told:
        members, apart = exchange.get("fit"), numbers(exchange.get("distances"))
        if isinstance(members, list) and len(members) == len(apart):
            for member, value in zip(members, apart, strict=True):
                of_each.setdefault(str(member), []).append((at, value))
    for points in of_each.values():
        if drawn := list(finite(points)):
            axes.plot(*zip(*drawn, strict=True), color=GREY, linewidth=0.7, alpha=0.5)
    axes.plot(*zip(*distance, strict=True), "o-", color=BLUE, markersize=3, label="consensus distance")
    if width:
        axes.plot(*zip(*width, strict=True), "--", color=RED, label="valley width")
    axes.set_ylabel("L2 norm, weight units")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=9)


def _shares(axes: Any, shares: Sequence[Points], chance: Points, spans: Points) -> None:
    tidy(axes, "In the span of a replica's last differences from the mean")
    for i, points in enumerate(shares):
        label = "share of its gradient" if i == 0 else None
        axes.plot(*zip(*points, strict=True), color=PURPLE, linewidth=1.0, alpha=0.8, label=label)
    if spans:
        axes.plot(*zip(*spans, strict=True), "s", color=GREEN, markersize=4, label="of the span, in top eigenvectors")
    if chance:
        axes.plot(*zip(*chance, strict=True), "--", color=GREY, linewidth=1, label="of a gradient, by chance")
    axes.set_yscale("log")
    axes.set_ylabel("share")
    axes.legend(frameon=False, fontsize=8)


def _words(told: Sequence[tuple[float, Mapping[str, Any]]], distance: Points, width: Points) -> str:
    """What the last exchange that tells of it has told."""
    last = next(e for _, e in reversed(told) if not math.isnan(number(e.get("consensus_distance"))))
    said = [f"consensus distance {distance[-1][1]:.4g}"]
    if width:
        said.append(f"valley width {width[-1][1]:.4g}")
    if not math.isnan(rank := number(last.get("effective_rank"))):
        said.append(f"effective rank {rank:.3g} of {max(0, len(numbers(last.get('distances'))) - 1)}")
    share, chance = number(last.get("gradient_share")), number(last.get("gradient_share_by_chance"))
    if not math.isnan(share):
        by_chance = "" if math.isnan(chance) else f" (by chance {chance:.2g})"
        said.append(f"{share:.3g} of the gradient in the span of the last differences{by_chance}")
    return f"At the last of {len(told)} exchanges: {', '.join(said)}."
