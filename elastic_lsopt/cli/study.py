"""`elastic-lsopt study FILE.yaml`: train and measure a grid of small networks; print and draw the measures' ranking."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from elastic_lsopt.cli.report import report
from elastic_lsopt.cli.terminal.progress import Told
from elastic_lsopt.config.study import StudyConfig, read_study
from elastic_lsopt.study.ranking import Ranking
from elastic_lsopt.study.study import Result, best_first, run_study


def study(path: str | Path, overrides: Sequence[str] = ()) -> int:
    """Run or continue the study, print and draw its ranking; returns the exit code, 1 where no network is ranked.

    Raises UserError, before a network is trained, for a wrong file.
    """
    read = read_study(path, overrides)
    with read.file.located(), Told("network") as told:
        result = run_study(read.config, told)
    out = Console(soft_wrap=True, highlight=False)
    out.print(ranking_table(result, read.config))
    for line in notes(result, read.config):
        out.print(line, markup=False)
    if any(isfinite(ranking.tau) for ranking in result.by_gap.values()):
        report(read.config.output_dir)
    return 0 if result.models else 1


def ranking_table(result: Result, config: StudyConfig) -> Table:
    """A measure a row, the best first."""
    table = Table(
        title=f"Kendall's tau-b with the generalisation gap, {len(result.models)} networks", title_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )  # fmt: skip
    table.add_column("measure", overflow="fold")  # a name may take two lines; a number is never cut
    for name in ("tau", f"{config.confidence:.0%} interval", "loss gap", "Psi", "n"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in best_first(result.by_gap):
        by_gap = result.by_gap[name]
        table.add_row(
            name, _number(by_gap.tau), _interval(by_gap), _number(result.by_loss_gap[name].tau), _number(by_gap.psi),
            str(by_gap.models),
        )  # fmt: skip
    return table


def notes(result: Result, config: StudyConfig) -> list[str]:
    """What the columns mean, and what is not in them."""
    lines = [
        "tau: with test error - training error; loss gap: tau with test loss - training loss; Psi: the mean tau among "
        "networks that differ in one hyper-parameter alone (each hyper-parameter's own: ranking.csv); n: networks."
    ]
    if result.others:
        first = result.others[0]
        lines.append(f"{len(result.others)} networks are not ranked; the first, {first['id']}: {first['reason']}.")
    for name, reasons in result.missing.items():
        reason, count = max(reasons.items(), key=lambda item: item[1])
        lines.append(f"{name} is missing on {sum(reasons.values())} networks; on {count}: {reason}")
    lines.append(f"Written to {config.output_dir}: study.json, ranking.csv, models.csv.")
    return lines


def _number(value: float) -> str:
    return f"{value:+.3f}" if isfinite(value) else "-"


def _interval(ranking: Ranking) -> str:
    low, high = ranking.interval
    return f"{low:+.3f} … {high:+.3f}" if isfinite(low) else "-"
