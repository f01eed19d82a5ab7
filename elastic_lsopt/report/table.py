"""The table of final values: each probe's last numbers with their errors, and what they cost. Reads a Run, no more."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from elastic_lsopt.report.measure_names import Measure, measure
from elastic_lsopt.report.pictures.draw_spectrum import ritz_values
from elastic_lsopt.report.run import EIGENVALUES, Reading, Run, number

COSTS = ("products", "passes", "gradients", "forwards")
NO_RESULTS = (
    "seconds", "dimension", "samples", "vectors", "steps", "parameters", "of", "seed", *COSTS,
)  # fmt: skip
"""Fields that say how a number came about."""

EXCHANGE = {
    "consensus_distance": ("consensus distance", "weight", "root mean square distance of the replicas from their mean"),
    "valley_width": ("valley width", "weight", "mean distance of the replicas from their mean"),
    "effective_rank": ("effective rank of the disagreement", "", "in how many directions the replicas differ"),
    "gradient_share": ("gradient in the span", "", "share of the gradient along a replica's last differences"),
    "gradient_share_by_chance": ("gradient in the span, by chance", "", ""),
}
"""Field of an exchange -> title, unit, meaning."""
BESIDE = {
    "span_share": "span of the disagreement in them", "span_share_by_chance": "span in them, by chance",
    "energy_share": "energy of the disagreement in them",
}  # fmt: skip
"""What a probe of eigenvalues tells of their vectors and the replicas' disagreement."""


@dataclass(frozen=True)
class Line:
    """One number; NaN where a part is not known."""

    title: str
    unit: str
    value: float
    error: float
    when: str
    work: str
    seconds: float
    meaning: str


def final_values(run: Run) -> list[Line]:
    """A line for each number that the probes have told last."""
    lasts = [(name, run.last(name)) for name in run.names()]
    of_probes = [line for name, last in lasts if last is not None for line in _lines(run, name, last)]
    return [*of_probes, *_of_the_last_exchange(run)]


def _of_the_last_exchange(run: Run) -> Iterator[Line]:
    """How far the replicas were apart when they last met, and where this one's gradient lay."""
    told = [(row.get("step"), row["exchange"]) for row in run.rows if isinstance(row.get("exchange"), dict)]
    for field, (title, unit, meaning) in EXCHANGE.items():
        found = ((step, number(exchange.get(field))) for step, exchange in reversed(told))
        last = next(((step, value) for step, value in found if not math.isnan(value)), None)
        if last is not None:
            yield Line(title, unit, last[1], math.nan, f"at step {last[0]}", "", math.nan, meaning)


def _lines(run: Run, name: str, reading: Reading) -> Iterator[Line]:
    kind, work = run.measure_of(name), ""
    shown = measure(name, kind)
    for cost in COSTS:
        if not math.isnan(count := reading.number(cost)):
            work = f"{count:,.0f} {cost}"
            break
    seconds = reading.number("seconds")
    whose = "" if kind == name else f" ({name})"
    for i, (title, value, error, unit) in enumerate(_numbers(kind, shown, reading, whose)):
        meaning = shown.meaning if i == 0 else ""  # what belongs to the probe is said once
        yield Line(title, unit, value, error, reading.when, *((work, seconds) if i == 0 else ("", math.nan)), meaning)


def _numbers(kind: str, shown: Measure, reading: Reading, whose: str) -> Iterator[tuple[str, float, float, str]]:
    """(title, value, error, unit) of one reading; `whose` is said where the measure's name does not tell."""
    if kind in EIGENVALUES:
        residuals = reading.numbers("residuals")
        for i, value in enumerate(reading.numbers("eigenvalues")):
            yield f"eigenvalue {i + 1}{whose}", value, residuals[i] if i < len(residuals) else math.nan, shown.unit
        beside = reading.probe.get("disagreement")
        if isinstance(beside, dict):
            for field, title in BESIDE.items():
                yield f"{title}{whose}", number(beside.get(field)), math.nan, ""
    elif kind == "spectral_density":
        if ritz := ritz_values(reading):
            unit = measure("lambda_max").unit
            yield f"smallest Ritz value{whose}", min(float(n[0]) for n, _ in ritz), math.nan, unit
            yield f"largest Ritz value{whose}", max(float(n[-1]) for n, _ in ritz), math.nan, unit
    else:
        if "value" in reading.probe:
            yield shown.title, reading.number("value"), _error(reading), shown.unit
        for field in reading.probe:
            value = reading.number(field)
            if field != "value" and not field.endswith("error") and field not in NO_RESULTS and not math.isnan(value):
                errors = (reading.number(f"{field}_{kind}") for kind in ("standard_error", "error"))
                error = next((e for e in errors if not math.isnan(e)), math.nan)
                yield f"{shown.title}: {field.replace('_', ' ')}", value, error, ""


def _error(reading: Reading) -> float:
    """The value's standard error, else what the product's relative error makes of it."""
    error = reading.number("standard_error")
    return abs(reading.number("value")) * reading.number("relative_error") if math.isnan(error) else error
