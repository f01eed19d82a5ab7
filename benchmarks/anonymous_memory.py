"""The peak of this process's anonymous memory: what it has of its own, without the pages of mapped files."""

from __future__ import annotations

import threading
from typing import Any


def anonymous_bytes() -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))


class Peak:
    """Inside, sampled each 2 ms: `bytes` is the largest growth since the beginning."""

    def __enter__(self) -> Peak:
        self._start, self.bytes, self._over = anonymous_bytes(), 0, threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._over.set()
        self._thread.join()

    def _sample(self) -> None:
        while True:
            self.bytes = max(self.bytes, anonymous_bytes() - self._start)
            if self._over.wait(0.002):
                return
