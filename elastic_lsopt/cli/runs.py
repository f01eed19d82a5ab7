"""`elastic-lsopt runs [FOLDER]`: the runs that lie in a folder; `runs compare RUN RUN …`: where they differ.

Reads what runs have left in their folders, never a process: a job that runs shows its last words.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from elastic_lsopt.errors import UserError
from elastic_lsopt.training.reporting.console import duration
from elastic_lsopt.training.reporting.run_folder import CONFIG, METRICS, read_metrics
from elastic_lsopt.training.reporting.run_state import STATE, read_state

HOME = "runs"
"""Where runs lie if nobody says otherwise."""
COMPARE = "compare"
MARKS = (STATE, METRICS)
DEPTH = 3
"""How far below the folder a run may lie."""
AT_END = ("step", "samples", "loss", "eval_loss", "lr", "batch", "world", "gradient_norm", "seconds")
"""Of the last step, in this order."""
UNSET = "-"


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A run at one look; None where nothing tells it."""

    name: str
    state: str
    step: int | None = None
    steps: int | None = None
    loss: float | None = None
    eval_loss: float | None = None
    batch: int | None = None
    members: int | None = None
    age_s: float | None = None
    """Since its last word."""


def runs(folders: Sequence[str], *, as_json: bool = False) -> int:
    """Print the table; returns 0. Raises UserError for a folder that is none, or holds no run."""
    if folders and folders[0] == COMPARE:
        return _compare([Path(folder) for folder in folders[1:]], as_json=as_json)
    if len(folders) > 1:
        raise UserError(f"runs takes one folder, not {len(folders)}; to compare: runs compare {' '.join(folders)}")
    home = Path(folders[0] if folders else HOME)
    found = [summary_of(run, home) for run in runs_in(home)]
    if not found:
        raise UserError(f"{home} holds no run; give the folder in which the output_dir of a job lies.")
    found.sort(key=lambda run: math.inf if run.age_s is None else run.age_s)
    if as_json:
        print(json.dumps([asdict(run) for run in found], indent=2))
    else:
        _print_summaries(found)
    return 0


def runs_in(home: Path) -> Iterator[Path]:
    """The run folders at most DEPTH below, itself among them; what lies inside a run is its own."""
    if not home.is_dir():
        raise UserError(f"{home} is no folder; give the one in which the output_dir of a job lies.")
    level = [home]
    for _ in range(DEPTH + 1):
        below: list[Path] = []
        for folder in level:
            if any((folder / mark).is_file() for mark in MARKS):
                yield folder
            else:
                below += sorted(p for p in _listed(folder) if p.is_dir() and not p.name.startswith("."))
        level = below


def _listed(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        return []


def summary_of(run: Path, home: Path) -> Summary:
    """What state.json and the last rows of metrics.jsonl tell."""
    name = str(run.relative_to(home)) if run != home else run.resolve().name
    told, rows = read_state(run), rows_of(run)
    last: Mapping[str, Any] = rows[-1] if rows else {}
    measured = next((row["eval_loss"] for row in reversed(rows) if row.get("eval_loss") is not None), None)
    return Summary(
        name=name,
        state=told["state"] if told else "unknown",
        step=last.get("step", told["step"] if told else None),
        steps=told["steps"] if told else None,
        loss=last.get("loss"),
        eval_loss=measured,
        batch=last.get("batch"),
        members=last.get("world"),
        age_s=time.time() - told["time"] if told else None,
    )


def rows_of(run: Path) -> list[dict[str, Any]]:
    """The steps of a run; [] where it has none. Raises UserError for a file that holds something else."""
    try:
        rows = read_metrics(run / METRICS)
    except FileNotFoundError:
        return []
    except (OSError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise UserError(f"{run / METRICS} is damaged ({type(error).__name__}: {error}).") from None
    if not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{run / METRICS} is damaged: a line is no object.")
    return rows


# -- comparing ---------------------------------------------------------------------------------------------------------


def _compare(folders: Sequence[Path], *, as_json: bool) -> int:
    if len(folders) < 2:
        raise UserError("runs compare needs two runs at least: runs compare runs/a runs/b")
    for folder in folders:
        if not any((folder / mark).is_file() for mark in (*MARKS, CONFIG)):
            raise UserError(f"{folder} is no run folder: it holds none of {', '.join((*MARKS, CONFIG))}.")
    settings, numbers = differing([settings_of(folder) for folder in folders]), [_at_end(f) for f in folders]
    names = [str(folder) for folder in folders]
    if as_json:
        print(json.dumps({"runs": names, "settings": settings, "at_end": numbers}, indent=2))
        return 0
    from elastic_lsopt.cli.terminal.tables import console_of_tables, table

    console = console_of_tables()
    if settings:
        rows = table(console, "Settings that differ", ["setting", *names])
        for key, values in settings.items():
            rows.add_row(key, *(UNSET if value is None else str(value) for value in values))
        console.print(rows)
    else:
        console.print("Their settings are the same.")
    rows = table(console, "At the last step", ["", *names])
    for key in AT_END:
        values = [run.get(key) for run in numbers]
        if any(value is not None for value in values):
            rows.add_row(key, *(_short(value) for value in values))
    console.print(rows)
    return 0


def settings_of(run: Path) -> dict[str, Any]:
    """The run's config.yaml, a line per value: `landscape.rho`. {} where it has none."""
    try:
        given = yaml.safe_load((run / CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{run / CONFIG} cannot be read ({type(error).__name__}).") from None
    return dict(_flat(given)) if isinstance(given, dict) else {}


def _flat(given: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in given.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


def differing(settings: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """The values of each key that is not the same in all; None: not set."""
    keys = dict.fromkeys(key for one in settings for key in one)
    values = {key: [one.get(key) for one in settings] for key in keys}
    return {key: row for key, row in values.items() if any(value != row[0] for value in row) and key != "output_dir"}


def _at_end(run: Path) -> dict[str, Any]:
    rows = rows_of(run)
    last = dict(rows[-1]) if rows else {}
    last["eval_loss"] = next((r["eval_loss"] for r in reversed(rows) if r.get("eval_loss") is not None), None)
    return {key: last.get(key) for key in AT_END}


# -- on paper ----------------------------------------------------------------------------------------------------------


def _print_summaries(found: Sequence[Summary]) -> None:
    from elastic_lsopt.cli.terminal.tables import console_of_tables, table

    console = console_of_tables()
    rows = table(console, "Runs", ["run", "state", "step", "loss", "held out", "batch", "members", "last word"])
    for run in found:
        step = UNSET if run.step is None else f"{run.step}" + (f"/{run.steps}" if run.steps else "")
        rows.add_row(
            run.name, run.state, step, _short(run.loss), _short(run.eval_loss), _short(run.batch), _short(run.members),
            UNSET if run.age_s is None else f"{duration(run.age_s)} ago",
        )  # fmt: skip
    console.print(rows)


def _short(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return UNSET
    return f"{value}" if isinstance(value, int) else f"{value:.4g}"
