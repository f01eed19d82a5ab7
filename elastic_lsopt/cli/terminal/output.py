"""Standard output that may be lost while a command writes: its reader has gone (`| head`), or a disk is full."""

from __future__ import annotations

from typing import Any, TextIO


class Output:
    """A text stream that remembers the error by which it was lost; `flush` raises it again, so that `leave` can say
    so."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.lost: OSError | None = None

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self.lost = error
            raise

    def flush(self) -> None:
        if self.lost:
            raise self.lost
        self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
