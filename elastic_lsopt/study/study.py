"""A study from its settings to its ranking: what is missing is trained and measured, then all is ranked and written.

study.json     {"measures": {name: {tau, interval, models, psi, granulated, loss_gap}}, "models": [{…}], …}
ranking.csv    a measure a line, the best first
models.csv     a ranked network a line
"""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from elastic_lsopt.config.study import AXES, StudyConfig
from elastic_lsopt.study.cell import IMPORTED_LATE, Task, train_and_measure
from elastic_lsopt.study.cells_file import Line, Record
from elastic_lsopt.study.grid import cells
from elastic_lsopt.study.measures import chosen
from elastic_lsopt.study.pool import run
from elastic_lsopt.study.ranking import Ranking, rank

STUDY, RANKING, MODELS = "study.json", "ranking.csv", "models.csv"
GAP, LOSS_GAP = "gap", "loss_gap"


@dataclass(frozen=True)
class Progress:
    """How far a study is: networks `done`, of `total`; `failed` of the done ones have no result."""

    done: int
    failed: int
    total: int


@dataclass(frozen=True)
class Result:
    """Each measure's ranking against the gap of the errors, and against that of the losses; what could not be ranked.

    `missing` counts, by measure, the reasons for which ranked networks lack it; `others` says why networks are not
    ranked.
    """

    by_gap: dict[str, Ranking]
    by_loss_gap: dict[str, Ranking]
    models: list[Line]
    others: list[Line]
    missing: dict[str, dict[str, int]]


def run_study(config: StudyConfig, heard: Callable[[Progress], None] = lambda _: None) -> Result:
    """Train, measure, rank and write; what an earlier start has done is taken from `cells.jsonl`.

    Raises SettingError for an unknown measure and for a folder that cannot be written.
    """
    measures = chosen(config)
    grid = {cell.id(config): cell for cell in cells(config)}
    with Record(config.output_dir) as record:
        open_tasks = [
            Task(cell, config, measures) for cell_id, cell in grid.items() if not record.done(cell_id, measures)
        ]
        done, failed = len(grid) - len(open_tasks), 0
        heard(Progress(done, failed, len(grid)))
        outcomes = run(
            open_tasks, train_and_measure, workers=config.workers, timeout_s=config.timeout_s, preload=IMPORTED_LATE
        )
        for outcome in outcomes:
            record.add(
                {
                    "id": outcome.task.cell.id(config), "settings": outcome.task.cell.settings(),
                    "failure": outcome.failure, "seconds": round(outcome.seconds, 3), "result": outcome.result,
                }
            )  # fmt: skip
            done, failed = done + 1, failed + (outcome.failure is not None)
            heard(Progress(done, failed, len(grid)))
        result = ranked([record.lines[cell_id] for cell_id in grid], measures, config)
        write(result, config)
    return result


def ranked(lines: Sequence[Line], measures: Sequence[str], config: StudyConfig) -> Result:
    """The ranking over the networks that have converged."""
    good = [line for line in lines if line["result"] and line["result"]["converged"]]
    models = [_model(line, measures) for line in good]
    others = [line["settings"] | {"id": line["id"], "reason": _reason(line)} for line in lines if line not in good]
    reasons = {name: Counter(filter(None, (line["result"]["reasons"].get(name) for line in good))) for name in measures}

    def by(gap: str) -> dict[str, Ranking]:
        return {
            name: rank(
                models, name, gap, axes=AXES, draws=config.bootstrap_draws, confidence=config.confidence,
                seed=config.seed,
            )
            for name in measures
        }  # fmt: skip

    return Result(by(GAP), by(LOSS_GAP), models, others, {k: dict(v) for k, v in reasons.items() if v})


def best_first(rankings: dict[str, Ranking]) -> list[str]:
    """Names by tau, the largest first; those without any at the end."""
    return sorted(rankings, key=lambda name: (-rankings[name].tau if isfinite(rankings[name].tau) else 2.0, name))


def _model(line: Line, measures: Sequence[str]) -> Line:
    result = dict(line["result"])
    values = {name: result["measures"][name] for name in measures}
    for key in ("measures", "reasons", "measure_seconds", "cpu_seconds", "converged"):
        result.pop(key, None)
    return {"id": line["id"]} | line["settings"] | result | values


def _reason(line: Line) -> str:
    return line["failure"] or next(iter(line["result"]["reasons"].values()))


def write(result: Result, config: StudyConfig) -> None:
    """study.json, ranking.csv and models.csv, each whole or not at all."""
    folder = Path(config.output_dir)
    measures = {
        name: _numbers(result.by_gap[name])
        | {"loss_gap": _numbers(result.by_loss_gap[name]), "missing": result.missing.get(name, {})}
        for name in best_first(result.by_gap)
    }
    whole = {"measures": measures, "models": result.models, "others": result.others, "settings": asdict(config)}
    replace_file(folder / STUDY, json.dumps(whole, indent=1, allow_nan=False) + "\n")
    rows = [
        {"measure": name, "tau": m["tau"], "low": m["interval"][0], "high": m["interval"][1], "models": m["models"]}
        | {"psi": m["psi"], "tau_loss_gap": m["loss_gap"]["tau"]}
        | {f"tau_{axis}": tau for axis, tau in m["granulated"].items()}
        for name, m in measures.items()
    ]
    replace_file(folder / RANKING, csv_of(rows))
    replace_file(folder / MODELS, csv_of(result.models))


def _numbers(ranking: Ranking) -> dict[str, Any]:
    def finite(value: float) -> float | None:
        return value if isfinite(value) else None

    return {
        "tau": finite(ranking.tau), "interval": [finite(v) for v in ranking.interval], "models": ranking.models,
        "psi": finite(ranking.psi), "granulated": {k: finite(v) for k, v in ranking.granulated.items()},
    }  # fmt: skip


def csv_of(rows: Sequence[Line]) -> str:
    from io import StringIO

    text = StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def replace_file(path: Path, text: str) -> None:
    new = path.with_suffix(f"{path.suffix}.new")
    new.write_text(text, encoding="utf-8")
    new.replace(path)
