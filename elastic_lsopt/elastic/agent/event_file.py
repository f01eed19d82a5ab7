"""An agent's events on disk, where `elastic.event_log` asks for them (elastic/<node>.events in the run folder).

python -m elastic_lsopt.elastic.membership.event_log run/elastic/host-1.events      plays them again
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import IO

from elastic_lsopt.elastic.membership.event_log import Entry, beginning
from elastic_lsopt.elastic.membership.record import Remembered
from elastic_lsopt.elastic.membership.state import State

log = logging.getLogger("elastic_lsopt")


class EventFile:
    """Takes events line by line; a disk that cannot be written ends the log with one warning, never the agent."""

    def __init__(self, path: Path | None) -> None:
        """`path` None: nothing is written."""
        self._path, self._out = path, None if path is None else _opened(path)

    def begin(self, state: State, remembered: Remembered | None, now_s: float) -> None:
        """How this life of the agent began."""
        if self._out is not None:
            self._write(beginning(state, remembered, now_s))

    def add(self, entry: Entry) -> None:
        """What came."""
        if self._out is not None:
            self._write(entry.to_line())

    def _write(self, line: str) -> None:
        assert self._out is not None
        try:
            self._out.write(line + "\n")
        except OSError as error:
            self._out = None
            log.warning("%s cannot be written (%s): this node's events are logged no more.", self._path, error.strerror)


def _opened(path: Path) -> IO[str] | None:
    try:
        return path.open("a", buffering=1, encoding="utf-8")  # a line that was written is on disk after a kill, too
    except OSError as error:
        log.warning("%s cannot be written (%s): this node's events are not logged.", path, error.strerror)
        return None
