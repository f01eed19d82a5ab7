"""Tasks in processes of their own, a few at a time: one that fails, hangs or is killed harms no other.

    for outcome in run(tasks, function, workers=2, timeout_s=300):
        outcome.task, outcome.result, outcome.failure      # the result, or None and what went wrong in a sentence

Each task gets a fresh process with one thread, forked from a server that has imported this package once (some 20 ms).
A process ends with its parent, also when that is killed. A task's time is its own: it runs from the moment at which its
process has imported what it needs, which on a busy machine with a slow disk may take longer than the task.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Generic, TypeVar

START_S = 300.0
"""A process that has not imported its task by then is stuck."""
BEGINS = "begins"
Task = TypeVar("Task")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Outcome(Generic[Task, Result]):
    """What became of a task: `failure` is None, or `result` is."""

    task: Task
    result: Result | None
    failure: str | None
    seconds: float


@dataclass
class _Running(Generic[Task]):
    task: Task
    process: BaseProcess
    reader: Connection
    since: float
    """When it was started; when the task began, once it has."""
    begun: bool = False

    def limit_s(self, timeout_s: float) -> float:
        return timeout_s if self.begun else START_S


def run(
    tasks: Iterable[Task],
    function: Callable[[Task], Result],
    *,
    workers: int,
    timeout_s: float,
    preload: Sequence[str] = (),
) -> Iterator[Outcome[Task, Result]]:
    """Outcomes in the order in which tasks end. `function` must be importable, its argument and result picklable.

    `preload` are modules that it imports when it runs: named here, they are imported once and not a process each.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, function.__module__, *preload])
    waiting, running = iter(tasks), dict[int, _Running[Task]]()
    try:
        while True:
            while len(running) < workers and (task := next(waiting, None)) is not None:
                started = _start(context, task, function)
                running[started.reader.fileno()] = started
            if not running:
                return
            first = min(r.since + r.limit_s(timeout_s) for r in running.values())
            wait([r.reader for r in running.values()], max(0.0, first - time.monotonic()))
            for key, one in [*running.items()]:
                outcome = _outcome(one, timeout_s)
                if outcome is not None:
                    del running[key]
                    yield outcome
    finally:
        for one in running.values():
            _end(one)


def _start(context: Any, task: Task, function: Callable[[Task], Result]) -> _Running[Task]:
    reader, writer = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(writer, function, task), daemon=True)
    process.start()
    writer.close()  # the child holds the only end: where it dies, the reader sees the end of the file
    return _Running(task, process, reader, time.monotonic())


def _outcome(one: _Running[Task], timeout_s: float) -> Outcome[Task, Any] | None:
    """None: it runs still."""
    result, failure = None, None
    seconds = time.monotonic() - one.since
    if one.reader.poll():
        try:
            said = one.reader.recv()
            if said == BEGINS:
                one.since, one.begun = time.monotonic(), True
                return None
            result, failure = said
        except EOFError:
            one.process.join()
            code = one.process.exitcode or 0
            name = f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
            failure = f"its process was {name}" if code < 0 else f"its process {name}"
    elif seconds > one.limit_s(timeout_s):
        failure = f"it took longer than timeout_s={timeout_s:g}" if one.begun else f"it did not begin in {START_S:g} s"
    else:
        return None
    _end(one)
    return Outcome(one.task, result, failure, seconds)


def _end(one: _Running[Any]) -> None:
    one.process.kill()  # what it had to say is said
    one.process.join()
    one.reader.close()


def _work(writer: Connection, function: Callable[[Any], Any], task: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is the parent's to handle
    threading.Thread(target=_end_with_parent, daemon=True).start()
    import torch

    torch.set_num_threads(1)
    writer.send(BEGINS)
    try:
        answer = function(task), None
    except MemoryError:
        answer = None, "it ran out of memory"
    except Exception as error:
        answer = None, " ".join(f"{type(error).__name__}: {error}".split())
    writer.send(answer)
    writer.close()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
