"""Ending on a signal.

[Note: ending on a signal] SIGTERM and Ctrl-C only set a flag. It travels in the all-reduce that ends a pass, so all
ranks see it after the same step; they save, and leave. Nothing is interrupted inside a pass, where weights may be
perturbed.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

from elastic_lsopt.api.engine import Engine


@contextmanager
def stopping_on_signals(engine: Engine) -> Iterator[None]:
    """Inside, a signal asks the engine to stop; see [Note: ending on a signal]."""
    before = {s: signal.signal(s, lambda *_: engine.request_stop()) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
