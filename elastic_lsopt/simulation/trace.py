"""Outages from a file of what has happened: plain CSV with one outage of one replica per line.

    replica,down_s,up_s
    3,86.5,1286.5

`replica` counts from 0. `down_s` and `up_s` are seconds from the job's start: when the replica was lost, and from when
on a machine stood ready in its place. Lines may come in any order; a replica's outages must not overlap.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from elastic_lsopt.errors import UserError
from elastic_lsopt.simulation.outages import Outages

COLUMNS = ("replica", "down_s", "up_s")


def read_trace(path: str | Path, replicas: int) -> Outages:
    """The file's outages, in order of time. Raises UserError with the file and its line for what cannot stand."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no text in UTF-8"
        raise UserError(f"--trace {path} cannot be read: {why}.") from None
    rows: list[tuple[float, float, int, int]] = []
    lines = iter([(number, line.split(",")) for number, line in enumerate(text.splitlines(), start=1) if line.strip()])
    first = next(lines, (1, []))[1]
    if tuple(name.strip() for name in first) != COLUMNS:
        raise UserError(f"{path}:1: the first line must read {','.join(COLUMNS)}.")
    for line, cells in lines:
        place = f"{path}:{line}"
        if len(cells) != len(COLUMNS):
            raise UserError(f"{place}: {len(cells)} cells; each line has {len(COLUMNS)}: {','.join(COLUMNS)}.")
        replica, down_s, up_s = _replica(cells[0], place, replicas), _time(cells[1], place), _time(cells[2], place)
        if up_s < down_s:
            raise UserError(f"{place}: up_s={up_s:g} must be >= down_s={down_s:g}.")
        rows.append((down_s, up_s, replica, line))
    rows.sort()
    _refuse_overlaps(path, rows)
    columns = list(zip(*rows, strict=True)) or [(), (), ()]
    return Outages(
        np.array(columns[2], np.int64), np.array(columns[0], np.float64), np.array(columns[1], np.float64),
        whole=True, traced=True,
    )  # fmt: skip


def _replica(cell: str, place: str, replicas: int) -> int:
    if not cell.strip().isdecimal():
        raise UserError(f"{place}: replica={cell.strip()!r} must be a whole number >= 0.")
    if int(cell) >= replicas:
        raise UserError(f"{place}: replica={int(cell)} must be below --replicas {replicas}; replicas count from 0.")
    return int(cell)


def _time(cell: str, place: str) -> float:
    try:
        value = float(cell)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise UserError(f"{place}: {cell.strip()!r} must be seconds >= 0 from the job's start.")
    return value


def _refuse_overlaps(path: str | Path, rows: list[tuple[float, float, int, int]]) -> None:
    last: dict[int, tuple[float, int]] = {}
    for down_s, up_s, replica, line in rows:
        up_before, before = last.get(replica, (0.0, 0))
        if before and down_s < up_before:
            raise UserError(
                f"{path}:{line}: replica {replica} is lost at {down_s:g} while line {before} has it away until "
                f"{up_before:g}; join the two."
            )
        last[replica] = (up_s, line)
