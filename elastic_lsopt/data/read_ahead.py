"""One thread that reads ahead.

[Note: not a ThreadPoolExecutor] A data set may start processes where it is read, as a DataLoader with workers does. A
process that is forked in a thread of `concurrent.futures` ends with exit code 1 and in silence: that module's handler
at the interpreter's end joins the thread it runs on. torch takes it for a worker that has died, and raises RuntimeError
in the main thread, wherever that is.
"""

from __future__ import annotations

import atexit
import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from types import TracebackType
from typing import Any, TypeVar

Result = TypeVar("Result")


class ReadAhead:
    """A context manager; `submit` a call, which is made when those before it are. The thread ends with the context."""

    def __init__(self) -> None:
        self._calls: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="step-loader", daemon=True)

    def submit(self, function: Callable[..., Result], *arguments: Any) -> Future[Result]:
        """What `function(*arguments)` will have returned or raised."""
        future: Future[Result] = Future()

        def call() -> None:
            try:
                future.set_result(function(*arguments))
            except BaseException as error:
                future.set_exception(error)

        self._calls.put(call)
        return future

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            call()
            del call

    def close(self) -> None:
        """Make no more calls; returns when the present one is made."""
        self._calls.put(None)
        if threading.current_thread() is not self._thread:  # whose garbage collection may close who has read ahead
            self._thread.join()

    def __enter__(self) -> ReadAhead:
        self._thread.start()
        atexit.register(self.close)  # else the interpreter's end stops the thread inside of torch: an abort
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        atexit.unregister(self.close)
        self.close()
