"""How fast this rank's own forwards are, without waiting for any of them.

On a GPU a forward is only asked for when the call returns. Events mark its beginning and end in the stream, and are
read after the pass, whose all-reduce the host waits for anyway.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class ForwardTime:
    """Samples and seconds of the forwards that ran inside `of(samples)`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._samples, self._seconds = 0, 0.0
        self._marks: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def of(self, samples: int) -> Iterator[None]:
        """One forward of so many samples; one that raises is not counted."""
        if self._device.type == "cuda":
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record(torch.cuda.current_stream(self._device))
            yield
            end.record(torch.cuda.current_stream(self._device))
            self._marks.append((begin, end))
        else:
            start = time.monotonic()
            yield
            self._seconds += time.monotonic() - start
        self._samples += samples

    @property
    def samples_per_second(self) -> float | None:
        """None before the first forward. Waits for the last of them to end."""
        for begin, end in self._marks:
            end.synchronize()
            self._seconds += begin.elapsed_time(end) / 1000  # milliseconds
        self._marks.clear()
        return self._samples / self._seconds if self._seconds else None
