"""Letters in: opened by the mailbox's threads, so that an agent's main thread sees those of its job alone.

[Note: letters at once] The main thread is woken for the first unread letter and then reads all that there are: to be
woken for each, and to wait for the interpreter's lock each time, costs a busy leader twice what the reading does.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from elastic_lsopt.elastic.mail.letter import opened
from elastic_lsopt.elastic.mail.signing import Refused
from elastic_lsopt.elastic.membership.record import Record

log = logging.getLogger("elastic_lsopt")
MOST_UNREAD_BYTES = 64 * 2**20
Opened = tuple[Record, bytes]
"""A letter's record, and the bytes of its report."""


class Inbox:
    """`put` hands an event to the agent's main thread, which calls `hear` with the letters that are unread then."""

    def __init__(
        self, name: str, secret: bytes, put: Callable[[Callable[[], None]], None], hear: Callable[[list[Opened]], None]
    ) -> None:
        self._name, self._secret, self._put, self._hear = name, secret, put, hear
        self._unread: list[Opened] = []
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
            self._unread.append((said, report))
            self._unread_bytes += len(message)
            first = len(self._unread) == 1
        if first:
            self._put(self._read)

    def _read(self) -> None:
        with self._lock:
            letters, self._unread, self._unread_bytes = self._unread, [], 0
        self._hear(letters)
