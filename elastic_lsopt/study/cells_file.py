"""What a study has done, one JSON object a line of `cells.jsonl`, so that a study that was stopped goes on.

    {"id": …, "settings": {…}, "failure": null, "seconds": 1.9, "result": {…}}

A line is one write of one process, which holds the file's lock. A line that a crash cut short is passed over. A network
is done where its last line has a result with every measure that is asked for; failures are tried again.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

from elastic_lsopt.config.ranges import SettingError

CELLS = "cells.jsonl"
Line = dict[str, Any]


class Record:
    """A study's `cells.jsonl`, open and locked; a context manager.

    Raises SettingError for a folder that cannot be written and for one in which another study is running.
    """

    def __init__(self, folder: str) -> None:
        path = Path(folder)
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path / CELLS, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            raise SettingError(
                "output_dir", f"output_dir={folder} cannot be written: {error.strerror}; choose another, or make room."
            ) from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._file)
            raise SettingError(
                "output_dir", f"output_dir={folder}: another study is writing there; let it end, or choose another."
            ) from None
        except OSError as error:  # a file system without locks
            os.close(self._file)
            raise SettingError(
                "output_dir", f"output_dir={folder} cannot be locked: {error.strerror}; choose another file system."
            ) from None
        text = (path / CELLS).read_text(encoding="utf-8", errors="replace")
        self.lines = last_lines(text)
        if text and not text.endswith("\n"):
            os.write(self._file, b"\n")

    def done(self, cell_id: str, measures: Iterable[str]) -> bool:
        """Whether the network has been trained, and all of these measures been tried on it."""
        result = self.lines.get(cell_id, {}).get("result")
        return result is not None and set(measures) <= set(result["measures"])

    def add(self, line: Line) -> None:
        """Append a line; it is on disk when this returns."""
        self.lines[line["id"]] = line
        os.write(self._file, (json.dumps(line, allow_nan=False) + "\n").encode())
        os.fsync(self._file)

    def __enter__(self) -> Record:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._file)


def last_lines(text: str) -> dict[str, Line]:
    """The last whole line of each network, by its id."""
    found: dict[str, Line] = {}
    for line in text.splitlines():
        try:
            value = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(value, dict) and {"id", "settings", "result"} <= set(value):
            found[value["id"]] = value
    return found
