"""Letters in: opened by the mailbox's threads, so that an agent's main thread sees those of its job alone."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from elastic_lsopt.elastic.letter import opened
from elastic_lsopt.elastic.record import Record
from elastic_lsopt.elastic.signing import Refused

log = logging.getLogger("elastic_lsopt")
MOST_UNREAD_BYTES = 64 * 2**20


class Inbox:
    """`put` hands an event to the agent's main thread, which calls `hear(record, report)` for each letter."""

    def __init__(
        self, name: str, secret: bytes, put: Callable[[Callable[[], None]], None], hear: Callable[[Record, bytes], None]
    ) -> None:
        self._name, self._secret, self._put, self._hear = name, secret, put, hear
        self._unread_bytes, self._lock = 0, threading.Lock()
        self._refused: set[str] = set()

    def take_in(self, message: bytes) -> None:
        """From any thread. More than the agent gets to read is lost, as a message may be: who sends faster than it
        reads must not fill its memory. What is no letter of this job disturbs nobody, not even the log twice."""
        if self._unread_bytes + len(message) > MOST_UNREAD_BYTES:
            return
        try:
            said, report = opened(message, self._secret)
        except Refused as error:
            if str(error) not in self._refused:
                self._refused.add(str(error))
                log.warning("%s refused a message: %s", self._name, error)
            return
        with self._lock:
            self._unread_bytes += len(message)
        self._put(lambda: self._read(said, report, len(message)))

    def _read(self, said: Record, report: bytes, size: int) -> None:
        with self._lock:
            self._unread_bytes -= size
        self._hear(said, report)
