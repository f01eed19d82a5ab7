"""`elastic-lsopt report RUN`: one HTML page and its pictures, from what the run has left in its folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from elastic_lsopt.elastic.worker.journal import JOURNAL, read_journal, read_meetings
from elastic_lsopt.errors import UserError
from elastic_lsopt.report.run import COMPARISON, PROBES, STUDY, Run, answers_of
from elastic_lsopt.report.write import write_report
from elastic_lsopt.training.reporting.run_folder import METRICS, read_metrics, replica_folders


def report(run_folder: str | Path) -> int:
    """Write the report and print where it lies; returns the exit code.

    Raises UserError where the folder is none, or is no run's, or holds nothing to draw.
    """
    folder = Path(run_folder)
    if not folder.is_dir():
        raise UserError(
            f"{folder} is no folder; give the output_dir of a job, or the folder of a probe, a study or a comparison."
        )
    if not any((folder / name).is_file() for name in (METRICS, PROBES, STUDY, COMPARISON)) and not answers_of(folder):
        raise UserError(
            f"{folder} is no run folder: it holds none of {METRICS}, {PROBES}, {STUDY}, {COMPARISON}; give the "
            "output_dir of a job."
        )
    others = replica_folders(folder)
    replicas = {number: rows for number, other in others.items() if (rows := _rows(other / METRICS))}
    run = Run.of(folder, _rows(folder / METRICS), _changes(folder), replicas, _meetings([folder, *others.values()]))
    for path in write_report(folder, run):
        print(path)
    return 0


def _rows(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    try:
        rows = read_metrics(path)
        if not all(isinstance(row, dict) and isinstance(row["step"], int) for row in rows):
            raise TypeError("a line is no object with a step")
    except (OSError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise _damaged(path, error) from error
    return rows


def _changes(folder: Path) -> list[dict[str, Any]]:
    try:
        return [change for change in read_journal(folder) if isinstance(change, dict)]
    except (OSError, UnicodeDecodeError) as error:
        raise _damaged(folder / JOURNAL, error) from error


def _meetings(folders: Sequence[Path]) -> list[dict[str, Any]]:
    try:
        return read_meetings(*folders)
    except (OSError, UnicodeDecodeError) as error:
        raise _damaged(folders[0] / JOURNAL, error) from error


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(f"{path} is damaged ({type(error).__name__}: {error}); take the lines away that are no steps.")
