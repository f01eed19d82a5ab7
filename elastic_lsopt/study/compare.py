"""A comparison from its settings to its table: each method's grid is tried, its best values are run on all seeds.

compare.json   {"rows": [{method, equal, axes …, chosen, runs, failed, numbers: {name: {mean, low, high, n}}}], …}
runs.csv       a run a line
table.csv      a row of compare.json a line

What is done stands in cells.jsonl, a run a line, by an identity that says all that its numbers depend on: the job's
settings, the labels' noise, what is equal, the target. So methods that come to the same job share its runs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b
from math import isfinite
from pathlib import Path
from typing import Any

from elastic_lsopt.config.compare import NOISE, CompareConfig, Keys
from elastic_lsopt.config.ranges import SettingError
from elastic_lsopt.config.settings import TrainConfig, landscape_fields
from elastic_lsopt.facts import Facts
from elastic_lsopt.optimizers import registry
from elastic_lsopt.study.cells_file import Line, Record
from elastic_lsopt.study.critical_batch import critical_batches
from elastic_lsopt.study.interval import interval
from elastic_lsopt.study.one_run import IMPORTED_LATE, Task, processes_of, rank_of, train_and_measure
from elastic_lsopt.study.pool import run
from elastic_lsopt.study.study import Progress, csv_of, replace_file
from elastic_lsopt.updates.registry import updates

COMPARE, RUNS, TABLE = "compare.json", "runs.csv", "table.csv"
MICROBATCH = "per_device_train_batch_size"
VERSION = 1
"""Raised when a run of the same settings comes to give other numbers."""
NO_PART = ("output_dir", "save_steps", "save_total_limit", "export", "resume_from_checkpoint", "dataset_cache_dir")
"""Settings of a job that a run's numbers do not depend on."""
SUMMARIZED = (
    "eval_loss", "eval_accuracy", "eval_macro_f1", "train_loss", "train_accuracy", "steps", "samples",
    "gradient_evaluations", "steps_to_target", "samples_to_target", "sent_bytes", "consensus_distance",
)  # fmt: skip
JobOf = Callable[[str, Keys], TrainConfig]


@dataclass(frozen=True)
class Contender:
    """A method at a point of the axes, and what its runs have in common."""

    label: str
    point: Keys
    equal: str

    def named(self) -> Keys:
        return {"method": self.label, "equal": self.equal, **self.point}


def contenders(config: CompareConfig) -> list[Contender]:
    return [
        Contender(label, point, equal)
        for point in config.points() for equal in config.equal for label in config.methods
        if config.tried_at(label, point)
    ]  # fmt: skip


def task_of(config: CompareConfig, one: Contender, chosen: Keys, seed: int, job_of: JobOf) -> Task:
    """One run. Raises UserError, with its place, for keys that make no job."""
    job = job_of(one.label, config.job_of(one.label, one.point, chosen) | {"seed": seed})
    if config.target_loss is not None and job.eval_steps is None:
        raise SettingError("target_loss", f"target_loss is looked for at evaluations: {one.label} needs eval_steps.")
    if config.target_loss is not None and job.consensus is not None:
        raise SettingError(
            "target_loss", f"target_loss is looked for while a run trains, and {one.label} has replicas, whose model "
            "is formed at the end; remove one of them.",
        )  # fmt: skip
    noise = float(one.point.get(NOISE, 0.0))
    equal = "epochs" if _takes_one_gradient(job) else one.equal  # then it is the same run
    kept = {key: value for key, value in asdict(job).items() if key not in NO_PART}
    said = {"job": kept, "noise": noise, "equal": equal, "target": config.target_loss, "version": VERSION}
    if config.measures:
        said["units"] = config.units
    evaluated_by = int(config.job.get(MICROBATCH, TrainConfig.per_device_train_batch_size))
    if evaluated_by != job.per_device_train_batch_size:
        said["evaluated_by"] = evaluated_by
    digest = blake2b(json.dumps(said, sort_keys=True, default=str).encode(), digest_size=6).hexdigest()
    told = one.named() | {"chosen": chosen, "seed": seed}
    return Task(digest, told, job, equal, noise, config.target_loss, config.measures, config.units, evaluated_by)


def _takes_one_gradient(job: TrainConfig) -> bool:
    """Whether each step of method and updates is known to take one gradient of the batch."""
    facts = getattr(registry.get(landscape_fields(job)[0]), "facts", None)
    bases = {job.optim, *(str(group.get("optim", job.optim)) for group in job.param_groups)}
    looks = any(getattr(updates.get(base), "sees", "nothing") != "nothing" for base in bases & {*updates.names()})
    return not looks and isinstance(facts, Facts) and facts.passes.split(",")[0].strip() == "1"


def check(config: CompareConfig, job_of: JobOf) -> int:
    """The number of runs, each of whose jobs is made once. Raises UserError for keys that make no job."""
    tuned = set()
    for one in contenders(config):
        candidates = config.candidates(one.label)
        made = {task_of(config, one, values, config.tuning_seed, job_of).id for values in candidates}
        tuned |= made if len(candidates) > 1 else set()
    return len(tuned) + len(contenders(config)) * len(config.seeds)


def run_comparison(
    config: CompareConfig, job_of: JobOf, heard: Callable[[Progress], None] = lambda _: None
) -> dict[str, Any]:
    """Tune, run, summarize and write; what an earlier start has done is taken from `cells.jsonl`.

    Raises SettingError for a folder that cannot be written.
    """
    everyone, total = contenders(config), check(config, job_of)
    with Record(config.output_dir) as record:
        done = _Done(record, config, total, heard)
        tried = {
            i: [task_of(config, one, values, config.tuning_seed, job_of) for values in config.candidates(one.label)]
            for i, one in enumerate(everyone) if len(config.candidates(one.label)) > 1
        }  # fmt: skip
        distinct = {task.id: task for tasks in tried.values() for task in tasks}
        done.run([*distinct.values()], measured=False)
        rows, runs = [], []
        finals: dict[int, list[Task]] = {}
        for i, one in enumerate(everyone):
            tasks = tried.get(i, [])
            ranks = [rank_of(record.lines[task.id]["result"]) for task in tasks]
            chosen = tasks[ranks.index(min(ranks))].told["chosen"] if tasks else config.candidates(one.label)[0]
            finals[i] = [task_of(config, one, chosen, seed, job_of) for seed in config.seeds]
        done.run([task for tasks in finals.values() for task in tasks])
        for i, one in enumerate(everyone):
            lines = [record.lines[task.id] for task in finals[i]]
            row = _row(config, one, finals[i][0].told["chosen"], lines)
            lost = [why for task in tried.get(i, []) if (why := failure_of(record.lines[task.id])) is not None]
            rows.append(row | {"grid_failed": len(lost), "grid_failure": next(iter(lost), None)})
            for kind, tasks in (("tuning", tried.get(i, [])), ("seed", finals[i])):
                runs += [_run_line(task, kind, record.lines[task.id]) for task in tasks]
    whole = {
        "rows": rows, "axes": [*config.axes], "critical_batches": critical_batches(config, rows),
        "confidence": config.confidence, "settings": asdict(config),
    }  # fmt: skip
    folder = Path(config.output_dir)
    replace_file(folder / COMPARE, json.dumps(whole, indent=1, allow_nan=False) + "\n")
    replace_file(folder / RUNS, csv_of(runs))
    replace_file(folder / TABLE, csv_of([_flat(row) for row in rows]))
    return whole


class _Done:
    """Runs what the record does not have yet, each identity once."""

    def __init__(self, record: Record, config: CompareConfig, total: int, heard: Callable[[Progress], None]) -> None:
        self._record, self._config, self._heard = record, config, heard
        self._total, self._done, self._failed = total, 0, 0

    def run(self, tasks: Sequence[Task], *, measured: bool = True) -> None:
        config = self._config
        each = {task.id: task for task in tasks}
        asks = {task.id: config.measures if measured else () for task in each.values()}
        missing = [task for task in each.values() if not self._record.done(task.id, asks[task.id])]
        if not measured:  # the grid is judged by the loss
            missing = [Task(**{**vars(task), "measures": ()}) for task in missing]
        self._said(len(tasks) - len(missing), 0)
        outcomes = run(
            missing, train_and_measure, workers=config.workers, timeout_s=config.timeout_s, preload=IMPORTED_LATE,
            processes=processes_of,
        )  # fmt: skip
        for outcome in outcomes:
            task, result = outcome.task, outcome.result
            self._record.add(
                {
                    "id": task.id, "settings": task.told, "failure": outcome.failure,
                    "seconds": round(outcome.seconds, 3), "result": result,
                }
            )  # fmt: skip
            self._said(1, outcome.failure is not None or bool(result and result["reason"]))

    def _said(self, done: int, failed: int) -> None:
        self._done, self._failed = self._done + done, self._failed + failed
        self._heard(Progress(self._done, self._failed, self._total))


def failure_of(line: Line) -> str | None:
    """Why a run has no numbers; None where it has."""
    return line["failure"] or line["result"]["reason"]


def _row(config: CompareConfig, one: Contender, chosen: Keys, lines: Sequence[Line]) -> dict[str, Any]:
    good = [line["result"] for line in lines if failure_of(line) is None]
    names = [*(n for n in SUMMARIZED if any(n in result for result in good)), *config.measures]
    numbers = {}
    for name in names:
        values = [r["measures"].get(name) if name in config.measures else r.get(name) for r in good]
        found = interval([float(v) for v in values if v is not None], config.confidence)
        numbers[name] = {
            "mean": _finite(found.mean), "low": _finite(found.mean - found.half),
            "high": _finite(found.mean + found.half), "n": found.n,
        }  # fmt: skip
    failures = [failure for line in lines if (failure := failure_of(line)) is not None]
    edges = [key for key, value in chosen.items() if _at_edge(value, config.methods[one.label]["grid"][key])]
    return one.named() | {
        "chosen": chosen, "at_edge": edges, "runs": len(lines), "failed": len(failures),
        "failure": next(iter(failures), None), "numbers": numbers,
    }  # fmt: skip


def _at_edge(value: Any, values: Sequence[Any]) -> bool:
    """Whether a better value may lie outside of the grid."""
    numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
    return len(numbers) == len(values) > 2 and value in (min(numbers), max(numbers))


def _finite(value: float) -> float | None:
    return value if isfinite(value) else None


def _run_line(task: Task, kind: str, line: Line) -> dict[str, Any]:
    result = dict(line["result"] or {})
    measures = result.pop("measures", {})
    for key in ("reasons", "measure_seconds", "reason"):
        result.pop(key, None)
    told = {key: value for key, value in task.told.items() if key not in ("chosen", "seed")}
    return {
        "id": task.id, "of": kind, **told, "seed": task.told["seed"], "chosen": _in_words(task.told["chosen"]),
        "failure": failure_of(line) or "", "seconds": line["seconds"], **result, **measures,
    }  # fmt: skip


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    numbers = {f"{name}{'' if key == 'mean' else f'_{key}'}": value for name, told in row["numbers"].items()
               for key, value in told.items()}  # fmt: skip
    rest = {key: value for key, value in row.items() if key not in ("numbers", "at_edge", "chosen")}
    return rest | {"chosen": _in_words(row["chosen"])} | numbers


def _in_words(chosen: Keys) -> str:
    return " ".join(f"{key}={value}" for key, value in chosen.items())
