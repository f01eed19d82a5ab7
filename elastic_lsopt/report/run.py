"""What a run folder tells of its probes: over training, of finished models, of a study or a comparison. It only reads.

config.yaml    {probes: {name: {measure: the measure's name, where it is not the probe's}}}
metrics.jsonl  {"step", "samples", "loss", "lr", "batch", "world", …, "probes": {name: {field: number or list}}} a line
               "exchange": {"number", "fit", "consensus_distance", …} where replicas met before the step
replica-1/metrics.jsonl                        the same, of another replica of the job
probes.json    {"probes": {name: {…}}, "model": where the model lies, "step", "when", "failed": {name: reason}}
probes/probe-2/probes.json                     the same: an answer of `elastic-lsopt probe` about this run
study.json     {"measures": {name: {"tau", "interval", "models"}}, "models": [{setting: …, "gap", measure: …}]}
compare.json   {"rows": [{"method", axis: …, "numbers": {name: {"mean", "low", "high", "n"}}}], "axes": […]}

Every field may be absent or null (what was not finite).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from elastic_lsopt.errors import UserError

CONFIG, PROBES, STUDY, COMPARISON = "config.yaml", "probes.json", "study.json", "compare.json"
ANSWERS = "probes"
"""The folder of the answers, a folder each."""
EIGENVALUES = ("top_eigenvalues", "lobpcg", "power_iteration", "lambda_max")
"""The measures that give eigenvalues, the richer first."""
LARGEST = 1e100
"""What is beyond has no place on an axis."""


@dataclass(frozen=True)
class Reading:
    """What one probe said once; `samples` is NaN for a finished model, `step` None where nobody knows it either."""

    probe: dict[str, Any]
    step: int | None = None
    samples: float = math.nan

    @property
    def when(self) -> str:
        return "of the finished model" if self.step is None else f"at step {self.step:,}"

    def number(self, field: str) -> float:
        return number(self.probe.get(field))

    def numbers(self, field: str) -> list[float]:
        return numbers(self.probe.get(field))


@dataclass(frozen=True)
class Run:
    """A run folder's contents, as far as the report draws them."""

    name: str
    rows: Sequence[dict[str, Any]] = ()
    changes: Sequence[dict[str, Any]] = ()
    finished: dict[str, Any] | None = None
    study: dict[str, Any] | None = None
    comparison: dict[str, Any] | None = None
    answers: Sequence[Run] = ()
    """What `elastic-lsopt probe` has found of it, newest first: each is seen as a run without steps."""
    measures: Mapping[str, str] = field(default_factory=dict)
    """Probe -> what it measures, of those that are not named by their measure."""
    replicas: Mapping[int, Sequence[dict[str, Any]]] = field(default_factory=dict)
    """The steps of the job's other replicas, by number."""
    meetings: Sequence[dict[str, Any]] = ()
    """Exchanges of replicas that were out of the ordinary."""
    only: str | None = None
    """The one probe that is seen, under its measure's name; None: all that are named by their measure."""

    @classmethod
    def of(
        cls, folder: Path, rows: Sequence[dict[str, Any]], changes: Sequence[dict[str, Any]],
        replicas: Mapping[int, Sequence[dict[str, Any]]] | None = None, meetings: Sequence[dict[str, Any]] = (),
    ) -> Run:  # fmt: skip
        """With the steps of metrics.jsonl, of other replicas' too, and the changes and meetings of journal.jsonl; the
        other files are read here."""
        return cls(
            folder.resolve().name, rows, changes, _object(folder / PROBES, "probes"),
            _object(folder / STUDY, "measures"), _object(folder / COMPARISON, "settings"),
            [cls.of(place, (), ()) for place in answers_of(folder)],
            _renamed(folder / CONFIG), replicas or {}, meetings,
        )  # fmt: skip

    @property
    def whose(self) -> str:
        """What a title adds where the run is seen by one probe alone."""
        return "" if self.only is None else f", probe {self.only}"

    def measure_of(self, name: str) -> str:
        """What a probe measures."""
        return self.measures.get(name, name)

    def alone(self, name: str) -> Run:
        """The run as this probe sees it: where its measure is asked for, it answers, and no other does."""
        return replace(self, only=name)

    def readings(self, *names: str) -> list[Reading]:
        """What the probe said over training, in order; of several `names` the first that a step has."""
        return [
            Reading(probe, row["step"], samples)
            for row in self.rows
            if (probe := _first(row.get("probes"), self._asked(names))) is not None
            and not math.isnan(samples := number(row.get("samples")))
        ]

    def last(self, *names: str) -> Reading | None:
        """What the probe said of the finished model, else at the end of training."""
        if (probe := _first((self.finished or {}).get("probes"), self._asked(names))) is not None:
            step = (self.finished or {}).get("step")
            return Reading(probe, step if isinstance(step, int) and not isinstance(step, bool) else None)
        return next(reversed(self.readings(*names)), None)

    def _asked(self, names: Sequence[str]) -> Sequence[str]:
        if self.only is None:
            return names
        return [self.only] if {self.only, self.measure_of(self.only)} & set(names) else []

    def names(self) -> list[str]:
        """The probes that have said something, in the order in which they first did."""
        found = [row.get("probes") for row in self.rows] + [(self.finished or {}).get("probes")]
        named = (name for probes in found if isinstance(probes, dict) for name, v in probes.items() if _is(v))
        return list(dict.fromkeys(named))


def held_out_metrics(row: Mapping[str, Any]) -> list[tuple[str, float]]:
    """(name in words, value) of what a step's evaluation has measured beside the loss."""
    found = ((key, number(value)) for key, value in row.items() if key.startswith("eval_") and key != "eval_loss")
    return [(key.removeprefix("eval_").replace("_", " "), value) for key, value in found if not math.isnan(value)]


def answers_of(folder: Path) -> list[Path]:
    """The folders of the answers about a run, the highest number first; one without an answer yet is left out."""
    found = [path.parent for path in (folder / ANSWERS).glob(f"*/{PROBES}")]
    return sorted(found, key=lambda path: (int((re.findall(r"\d+$", path.name) or ["0"])[0]), path.name), reverse=True)


def number(value: Any) -> float:
    """A number that can be drawn, or NaN for whatever is none."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not -LARGEST < value < LARGEST:
        return math.nan
    return float(value)


def numbers(values: Any) -> list[float]:
    """A list's numbers, NaN where one is none; empty for whatever is no list."""
    return [number(v) for v in values] if isinstance(values, list) else []


def finite(pairs: Iterable[tuple[float, float]]) -> Iterator[tuple[float, float]]:
    """The pairs of which both are numbers."""
    return (pair for pair in pairs if not any(math.isnan(v) for v in pair))


def _renamed(config: Path) -> dict[str, str]:
    """The probes of a job's YAML that name a measure; none where there is no such file, or it cannot be read."""
    import yaml

    try:
        probes = yaml.safe_load(config.read_text(encoding="utf-8"))["probes"]
        named = {name: given.get("measure") for name, given in probes.items() if isinstance(given, dict)}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError):
        return {}
    return {str(name): measure for name, measure in named.items() if isinstance(measure, str)}


def _is(probe: Any) -> bool:
    return isinstance(probe, dict) and bool(probe)


def _first(probes: Any, names: Sequence[str]) -> dict[str, Any] | None:
    if not isinstance(probes, dict):
        return None
    return next((probes[name] for name in names if _is(probes.get(name))), None)


def _object(path: Path, key: str) -> dict[str, Any] | None:
    """The JSON object of a file, None where there is no file; raises UserError for one that is no such object."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); write it again, or take it away.") from error
    if not isinstance(found, dict) or not isinstance(found.get(key), dict):
        raise UserError(f"{path} holds no object with an object {key!r} in it; write it again, or take it away.")
    return found
