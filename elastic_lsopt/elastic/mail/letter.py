"""Letters between agents: a record and what its writer reports of its workers, signed; made and read by side threads.

    MAC <space> time of signing \\n the record, JSON \\n the report, JSON

An agent of a thousand nodes reads thousands of letters a second, so the record is read straight from its bytes, and the
report is not read at all before someone asks for the status.
"""

from __future__ import annotations

import json
import time
from functools import cached_property
from typing import Any

from elastic_lsopt.elastic.mail.signing import Refused, refuse_skew, seal, unseal
from elastic_lsopt.elastic.membership.record import Record


class Letter:
    """A letter to be sent; `sealed` is its bytes, made once and by whoever asks first."""

    def __init__(self, record: Record, report: dict[str, Any] | None, secret: bytes) -> None:
        self._record, self._report, self._secret, self._at = record, report, secret, time.time()

    @cached_property
    def sealed(self) -> bytes:
        report = b"" if self._report is None else json.dumps(self._report, separators=(",", ":")).encode()
        return seal(b"%r\n%b\n%b" % (self._at, self._record.to_bytes(), report), self._secret)


def opened(letter: bytes, secret: bytes, *, now: float | None = None) -> tuple[Record, bytes]:
    """The record, and the bytes of the report (b"": it has none). Raises Refused as `signing.verified` does."""
    text = unseal(letter, secret)
    try:
        at, record, report = text.split(b"\n", 2)
        signed_at = float(at)
        said = Record.from_bytes(record)
    except ValueError as error:
        raise Refused(f"a signed letter cannot be read: {' '.join(str(error).split())[:300]}.") from None
    refuse_skew(signed_at, now)
    return said, report
