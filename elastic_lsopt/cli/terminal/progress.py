"""How far a study or a comparison is, on stderr: a bar on a terminal, else a line now and then."""

from __future__ import annotations

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from elastic_lsopt.study.study import Progress

LINE_EVERY_S = 10.0


class Told:
    """Called with each `Progress`; a context manager. `what` is one of the things that are counted."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._console = Console(file=sys.stderr, soft_wrap=True, highlight=False)
        self._bar: Bar | None = None
        self._began, self._said = time.monotonic(), 0.0

    def __call__(self, now: Progress) -> None:
        failed = f"{now.failed} failed" if now.failed else ""
        if self._console.is_terminal:
            if self._bar is None:
                self._bar = Bar(
                    TextColumn(self._what), MofNCompleteColumn(), BarColumn(), TimeElapsedColumn(), TextColumn("<"),
                    TimeRemainingColumn(), TextColumn("{task.fields[failed]}"), console=self._console,
                )  # fmt: skip
                self._task = self._bar.add_task("", total=now.total, completed=now.done, failed=failed)
                self._bar.start()
            self._bar.update(self._task, completed=now.done, failed=failed)
        elif time.monotonic() - self._said > LINE_EVERY_S or now.done == now.total:
            self._said = time.monotonic()
            rest = f", {failed}" if failed else ""
            print(f"{now.done}/{now.total} {self._what}s{rest}, {self._said - self._began:.0f} s", file=sys.stderr)

    def __enter__(self) -> Told:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
