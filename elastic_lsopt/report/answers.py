"""The answers of `elastic-lsopt probe` about a run: what each is of, when it was given, what it could not measure."""

from __future__ import annotations

import math
from pathlib import PurePath
from typing import Any

from elastic_lsopt.report.run import Run, number


def keys(run: Run) -> list[str]:
    """What links and files call the run's answers: the oldest is 1, so a later one renames none."""
    return [f"answer-{number}" for number in range(len(run.answers), 0, -1)]


def heading(answer: Run) -> str:
    """Its name, and the checkpoint or model that it is of."""
    model = _told(answer).get("model")
    return f"{answer.name} of {PurePath(model).name}" if isinstance(model, str) and model else answer.name


def summary(answer: Run) -> str:
    """When, of what, on how many samples, in a line."""
    told = _told(answer)
    said = [text for key in ("when", "model") if isinstance(text := told.get(key), str)]
    for key, text in (
        ("step", "step {:,.0f}"), ("samples", "{:,.0f} samples"), ("loss", "loss {:.4f} nats"),
        ("workers", "world {:.0f}"),
    ):  # fmt: skip
        if not math.isnan(value := number(told.get(key))):
            said.append(text.format(value))
    measures = told.get("probes")
    said.append("measures: " + (", ".join(map(str, measures)) if isinstance(measures, dict) and measures else "none"))
    return " · ".join(said)


def failures(answer: Run) -> list[str]:
    """A line for each measure that gave nothing, with the reason."""
    failed = _told(answer).get("failed")
    return [f"{name}: {reason}" for name, reason in failed.items()] if isinstance(failed, dict) else []


def _told(answer: Run) -> dict[str, Any]:
    return answer.finished or {}
