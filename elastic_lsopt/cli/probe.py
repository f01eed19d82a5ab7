"""`elastic-lsopt probe MODEL --measures …`: curvature and flatness of a finished model, in a table and its run."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from elastic_lsopt.errors import UserError

MEASURES = "lambda_max,trace,frobenius,lpf,sam_sharpness"
SHOWN = ("value", "eigenvalues")
"""The field of a result that the table shows, the first that it has."""


def arguments_of(parser: argparse.ArgumentParser) -> None:
    """The sub-command's arguments."""
    parser.add_argument(
        "model", metavar="MODEL", type=Path, help="a checkpoint, a run folder, or a Hugging Face folder"
    )
    parser.add_argument("--measures", default=MEASURES, metavar="A,B,…", help=f"what to measure (default: {MEASURES})")
    parser.add_argument(
        "--set", dest="settings", action="append", default=[], metavar="MEASURE.KEY=VALUE",
        help="a measure's setting, such as trace.samples=50",
    )  # fmt: skip
    parser.add_argument("--data", metavar="DATASET", help="a dataset as in a job's YAML (default: the run's own)")
    parser.add_argument("--other", type=Path, metavar="MODEL", help="another model, for mode_connectivity")
    parser.add_argument("--average", metavar="NAME", help="measure at an average that the run kept, such as swa")
    parser.add_argument("--trust", action="store_true", help="run the code that the run's settings name as the model")
    parser.add_argument("--units", type=int, default=4, help="batches of data to measure on (default: 4)")
    parser.add_argument("--batch-size", type=int, help="samples in each (default: the run's micro-batch, else 8)")
    parser.add_argument("--block-size", type=int, help="tokens in a sample (default: the run's, else 128)")
    parser.add_argument("--products", default="auto", help="auto, kept, rebuilt, blockwise or differences")
    parser.add_argument("--workers", type=int, default=1, help="processes to start where no launcher did (default: 1)")
    parser.add_argument(
        "--output", type=Path, metavar="FOLDER",
        help="where the answer's folder probe-N is made (default: RUN/probes, of a model of no run runs/probe)",
    )  # fmt: skip


def probe(arguments: argparse.Namespace, argv: Sequence[str]) -> int:
    """Run the measurement; returns the exit code. Raises UserError for wrong input, before a worker starts."""
    from elastic_lsopt.training.probing.finished_model import Question, settings_of
    from elastic_lsopt.training.processes import launched, start_workers

    for name in ("units", "batch_size", "block_size", "workers"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value} must be >= 1.")
    question = Question(
        model=arguments.model, measures=_measures(arguments.measures, arguments.settings), output=arguments.output,
        data=arguments.data, units=arguments.units, batch_size=arguments.batch_size, block_size=arguments.block_size,
        products=arguments.products, other=arguments.other, trust=arguments.trust,
        average=arguments.average,
    )  # fmt: skip
    settings_of(question, arguments.workers)
    if not launched() and arguments.workers > 1:
        return start_workers(arguments.workers, ["probe", *argv], module="elastic_lsopt")
    return _one_rank(question)


def _measures(names: str, settings: Sequence[str]) -> dict[str, dict[str, Any]]:
    import yaml

    chosen: dict[str, dict[str, Any]] = {name.strip(): {} for name in names.split(",") if name.strip()}
    if not chosen:
        raise UserError("--measures is empty; name one or more, such as lambda_max,trace.")
    for text in settings:
        place, equals, value = text.partition("=")
        name, dot, key = place.partition(".")
        if not equals or not dot or name not in chosen:
            raise UserError(f"--set {text!r} must read MEASURE.KEY=VALUE with a measure of --measures.")
        try:
            chosen[name][key] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise UserError(f"--set {text!r}: the value is no YAML.") from None
    return chosen


def _one_rank(question: Any) -> int:
    from elastic_lsopt.cli.train import leave, say_failure
    from elastic_lsopt.training.probing.answer_folder import drawn_by
    from elastic_lsopt.training.probing.finished_model import RESULTS, answer
    from elastic_lsopt.training.processes import join
    from elastic_lsopt.training.reporting.console import Console
    from elastic_lsopt.training.reporting.quiet import report_loads, silence_libraries

    silence_libraries()
    world = join()
    report_loads(world.is_first)
    try:
        console = Console()
        console.attend(speaks=world.is_first, steps=0, done=0)
        told, folder = answer(question, world, console.say)
        console.close()
        if folder is not None:
            _show(told)
            print(f"written to {folder / RESULTS}; elastic-lsopt report {drawn_by(folder)} draws it.")
        code = 0
    except Exception as error:
        code = say_failure(error, world)
    return leave(code, world.size)


def _show(told: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("measure", "value", "error", "products", "seconds", box=None, header_style="bold")
    for name, result in told["probes"].items():
        if result is None:
            table.add_row(name, "-", f"none: {told['failed'][name]}", "", "")
            continue
        value = next((result[key] for key in SHOWN if key in result), None)
        error = result.get("standard_error", max(result.get("residuals") or [None], key=lambda r: r or 0.0))
        table.add_row(name, _text(value), _text(error), _text(result.get("products")), _text(result.get("seconds")))
    Console(file=sys.stdout, soft_wrap=True, highlight=False).print(
        f"{told['model']}: {told['parameters']:,} parameters, {told['samples']} samples, loss {told['loss']:.4g}", table
    )


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(_text(v) for v in value[:5])
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)
