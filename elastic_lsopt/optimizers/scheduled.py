"""A hyper-parameter that is a number, or one that moves over the run: rho, gamma, sigma on the sample clock.

rho: 0.05
rho: {start: 0.02, end: 0.1, shape: linear}              over the whole run
rho: {start: 0, end: 0.3, shape: step, after: 0.1}       0 for a tenth of the run, then 0.3

u = (t / T - after) / (until - after), cut to [0, 1];  linear: start + u (end - start);  cosine: half a wave of it;
step: start while u = 0, then end
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from elastic_lsopt.by_name import nearest, require_number
from elastic_lsopt.errors import UserError
from elastic_lsopt.oracle.clock import SampleClock

Scheduled = float | dict[str, Any]
"""A number, or {start, end, shape: linear | cosine | step, after: 0, until: 1}."""
KEYS = ("start", "end", "shape", "after", "until")
SHAPES = ("linear", "cosine", "step")


def require_scheduled(name: str, value: Any) -> None:
    """One line for a number below 0, and for a schedule with a key or a value that it cannot have."""
    if not isinstance(value, Mapping):
        require_number(name, value)
        return
    for key in value:
        if key not in KEYS:
            raise UserError(f"{name} has no key {key!r}{nearest(str(key), KEYS, 'A schedule has')}.")
    for key in ("start", "end"):
        if key not in value:
            raise UserError(f"{name}={dict(value)} has no {key}; give start and end.")
        require_number(f"{name}.{key}", value[key])
    shape, after, until = value.get("shape", "linear"), value.get("after", 0.0), value.get("until", 1.0)
    if shape not in SHAPES:
        raise UserError(f"{name}.shape={shape!r} must be one of {', '.join(SHAPES)}.")
    if not all(isinstance(share, int | float) for share in (after, until)) or not 0 <= after < until <= 1:
        raise UserError(
            f"{name}: after={after!r} and until={until!r} must be shares of the run, 0 <= after < until <= 1."
        )


def value_at(name: str, value: Scheduled, clock: SampleClock) -> float:
    """The number at this point of the run. Raises UserError for a schedule in a run whose length is not known."""
    if not isinstance(value, Mapping):
        return float(value)
    if clock.total_samples is None:
        raise UserError(
            f"{name}={dict(value)} moves over the run, whose length is not known; give total_samples to the optimizer."
        )
    start, end, after = float(value["start"]), float(value["end"]), value.get("after", 0.0)
    u = min(max((clock.progress - after) / (value.get("until", 1.0) - after), 0.0), 1.0)
    match value.get("shape", "linear"):
        case "linear":
            share = u
        case "cosine":
            share = (1 - math.cos(math.pi * u)) / 2
        case _:
            share = float(u > 0)
    return start + share * (end - start)


def refuse_unknown_length(method: Any, clock: SampleClock) -> None:
    """Raise UserError for a method with a field that moves over the run, or a schedule in its `over_the_run` (by name),
    in a run whose length is not known: when it is built, and not in its first step."""
    own = {f.name: getattr(method, f.name) for f in fields(method)} if is_dataclass(method) else {}
    for name, value in (own | getattr(method, "over_the_run", {})).items():
        if isinstance(value, Mapping) and {"start", "end"} <= value.keys():
            value_at(name, dict(value), clock)
