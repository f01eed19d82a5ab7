"""The measures of a study: those of the one catalogue that are a number, by the catalogue's names.

Each is larger where the minimum is thought sharper or the network more complex, at the weights where the network has
ended, on the loss of the whole training set.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from math import isfinite, nan
from typing import Any

from elastic_lsopt.config.ranges import SettingError
from elastic_lsopt.config.spelling import did_you_mean
from elastic_lsopt.config.study import StudyConfig
from elastic_lsopt.errors import UserError
from elastic_lsopt.probes.catalogue import MEASURES, ProbeContext, headline, measure
from elastic_lsopt.probes.measurement import Measurement
from elastic_lsopt.probes.presets import STUDIED

KNOWN = ("initial", "branches")
"""What a study knows of the training around a network."""
NO_NUMBER = ("surface", "spectral_density", "noise_scale")


def chosen(config: StudyConfig) -> tuple[str, ...]:
    """The measures of a study: those that are named, else all. Raises SettingError as `check` does."""
    check(config.measures or (), KNOWN)
    return config.measures or STUDIED


def asked(measuring: Measurement, measures: Sequence[str], context: ProbeContext) -> dict[str, Any]:
    """`measures` by name, `reasons` of those that failed, and the `measure_seconds` of each."""
    values: dict[str, float | None] = {}
    reasons: dict[str, str] = {}
    seconds: dict[str, float] = {}
    for name in measures:
        began = time.monotonic()
        try:
            with measuring.at_rest():
                answer = measuring.take(name, {}, context)
            value = nan if answer.reason is not None else headline(answer.told)
            values[name] = value if isfinite(value) else None
            if values[name] is None:
                reasons[name] = answer.reason or f"it is {value}"
        except Exception as error:  # one measure's failure is that measure's
            values[name], reasons[name] = None, " ".join(f"{type(error).__name__}: {error}".split())
        seconds[name] = round(time.monotonic() - began, 3)
    return {"measures": values, "reasons": reasons, "measure_seconds": seconds}


def check(measures: Sequence[str], known: Sequence[str]) -> None:
    """Raise SettingError, with the nearest name, for a measure that there is not, that is no number, or that needs what
    is not `known` of the training."""
    for name in measures:
        if name in NO_NUMBER:
            raise SettingError(
                "measures", f"measure {name!r} is not one number, so nothing can be ranked by it; remove it."
            )
        if name not in MEASURES:
            numbers = [each for each in MEASURES if each not in NO_NUMBER]
            raise SettingError("measures", f"measure {name!r} is unknown{did_you_mean(name, numbers)}")
        try:
            measure(name, {}, known)
        except UserError as error:
            raise SettingError("measures", str(error)) from None
