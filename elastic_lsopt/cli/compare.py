"""`elastic-lsopt compare FILE.yaml`: tune and train methods on the same task, print and draw means with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from elastic_lsopt.cli.job_file import job_of
from elastic_lsopt.cli.report import report
from elastic_lsopt.cli.terminal.progress import Told
from elastic_lsopt.cli.terminal.tables import console_of_tables, table
from elastic_lsopt.config.compare import CompareConfig, Comparison, Keys, read_comparison
from elastic_lsopt.config.ranges import SettingError
from elastic_lsopt.config.settings import TrainConfig
from elastic_lsopt.errors import UserError
from elastic_lsopt.study.compare import run_comparison
from elastic_lsopt.study.measures import check
from elastic_lsopt.training.reporting.quiet import silence_libraries

SHOWN = (
    ("eval_loss", "held out"), ("eval_accuracy", "accuracy"), ("train_loss", "train loss"), ("steps", "steps"),
    ("gradient_evaluations", "gradients"), ("steps_to_target", "to target"), ("samples_to_target", "samples"),
    ("sent_bytes", "bytes"), ("consensus_distance", "apart"),
)  # fmt: skip
"""Numbers of a run in the order of the table's columns, and their names there."""


def compare(path: str | Path, overrides: Sequence[str] = ()) -> int:
    """Run or continue the comparison, print and draw it; returns the exit code, 1 where no run has ended well.

    Raises UserError, before a run begins, for a wrong file.
    """
    silence_libraries()
    read = read_comparison(path, overrides)
    with read.file.located(), Told("run") as told:
        check(read.config.measures, ("initial",))
        whole = run_comparison(read.config, _jobs(read), told)
    out = console_of_tables()
    out.print(compared_table(out, whole))
    for line in notes(whole, read.config):
        out.print(line, markup=False)
    if not any(row["runs"] > row["failed"] for row in whole["rows"]):
        return 1
    report(read.config.output_dir)
    return 0


def _jobs(read: Comparison) -> Any:
    """A run's settings by method and keys, each made once; an error has the place of the key and the method's label."""
    made: dict[str, TrainConfig] = {}

    def job(label: str, keys: Keys) -> TrainConfig:
        name = repr((label, sorted(keys.items(), key=lambda item: item[0])))
        if name not in made:
            try:
                made[name] = job_of(read.job_file(label, keys)).config
            except UserError as error:
                raise UserError(f"{error} (as method {label!r} of the comparison)") from None
            if made[name].task != "classification" and "label_noise" in read.config.axes:
                raise SettingError("axes.label_noise", "label_noise is for dataset digits; remove the axis.")
        return made[name]

    return job


def compared_table(out: Any, whole: Mapping[str, Any]) -> Table:
    """A row per method and point of the axes."""
    rows, measures = whole["rows"], whole["settings"]["measures"]
    shown = [(key, name) for key, name in SHOWN if any(key in row["numbers"] for row in rows)]
    shown += [(name, name) for name in measures]
    axes = [*whole["axes"], *(["equal"] if len({row["equal"] for row in rows}) > 1 else [])]
    made = table(out, f"Means over seeds ± half of the {whole['confidence']:.0%} interval", [
        *axes, "method", "chosen", *(name for _, name in shown), "n",
    ])  # fmt: skip
    for row in rows:
        chosen = " ".join(f"{key.rpartition('.')[2]}={value}" for key, value in row["chosen"].items())
        cells = [_cell(row["numbers"].get(key), row["runs"]) for key, _ in shown]
        n = f"{row['runs'] - row['failed']}" + (f" of {row['runs']}" if row["failed"] else "")
        made.add_row(*(str(row[axis]) for axis in axes), row["method"], chosen or "-", *cells, n)
    return made


def _cell(told: Mapping[str, Any] | None, runs: int) -> str:
    """The mean, half of the interval, and of how many runs where not of all."""
    if told is None or told["mean"] is None:
        return "-"
    half = "" if told["high"] is None else f" ± {told['high'] - told['mean']:.2g}"
    of = "" if told["n"] == runs else f" (n={told['n']})"
    return f"{told['mean']:.4g}{half}{of}"


def notes(whole: Mapping[str, Any], config: CompareConfig) -> list[str]:
    """What the columns mean, and what is not in them."""
    by = "steps to the target, then held-out loss" if config.target_loss else "held-out loss"
    lines = [
        f"Intervals are Student's t over {len(config.seeds)} seeds; n: runs that a mean is of. Grids were tuned on "
        f"seed {config.tuning_seed}, by {by}."
    ]
    for row in whole["rows"]:
        where = ", ".join([row["method"], *(f"{axis}={row[axis]}" for axis in ("equal", *whole["axes"]))])
        if row["failed"]:
            lines.append(
                f"{where}: {row['failed']} of {row['runs']} runs have no numbers; the first: {row['failure']}."
            )
        if row["grid_failed"]:
            lines.append(
                f"{where}: {row['grid_failed']} values of its grid have no numbers; the first: {row['grid_failure']}."
            )
        reached = row["numbers"].get("steps_to_target")
        if reached is not None and reached["n"] < row["runs"]:
            lines.append(
                f"{where}: {reached['n']} of {row['runs']} runs have reached the target; steps and samples to it are "
                "of these alone."
            )
        if row["at_edge"]:
            keys = " and ".join(row["at_edge"])
            lines.append(f"{where}: the best {keys} is at the edge of its grid; a better one may lie beyond.")
    for fit in whole["critical_batches"]:
        where = ", ".join(str(value) for name, value in fit.items() if name in ("method", *whole["axes"]))
        told = "steps fall as 1 / batch up to the largest, or not at all"
        if "critical_batch" in fit:
            told = f"critical batch {fit['critical_batch']:.3g}, at least {fit['fewest_steps']:.3g} steps"
        lines.append(f"{where}: {told} (fit over the batches {', '.join(map(str, fit['batches']))}).")
    lines.append(f"Written to {config.output_dir}: compare.json, runs.csv, table.csv.")
    return lines
