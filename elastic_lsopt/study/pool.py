"""Tasks in processes of their own, a few at a time: one that fails, hangs or is killed harms no other.

    for outcome in run(tasks, function, workers=2, timeout_s=300):
        outcome.task, outcome.result, outcome.failure      # the result, or None and what went wrong in a sentence

Each task gets a fresh process with one thread, forked from a server that has imported this package once (some 20 ms).
A process ends with its parent, also when that is killed. A task's time is its own: it runs from the moment at which its
process has imported what it needs, which on a busy machine with a slow disk may take longer than the task.

A task of several `processes` has as many, each with the environment in which a launcher starts a rank. The result is
what the first returns; where one fails, the task does.
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
class _Process:
    process: BaseProcess
    reader: Connection
    begun: bool = False
    answer: tuple[Any, str | None] | None = None
    """The result, or None and what went wrong; None: it runs still."""

    def listen(self) -> bool:
        """Take in what it has said; whether that was that its task begins."""
        if self.answer is not None or not self.reader.poll():
            return False
        try:
            said = self.reader.recv()
        except EOFError:
            self.process.join()
            code = self.process.exitcode or 0
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
            said = None, f"its process {how}"
        if said == BEGINS:
            self.begun = True
            return True
        self.answer = said
        return False


@dataclass
class _Running(Generic[Task]):
    task: Task
    processes: list[_Process]
    store: Any
    """Of several processes, through which they meet."""
    since: float
    """When it was started; when the task began, once it has on all processes."""

    @property
    def begun(self) -> bool:
        return all(one.begun for one in self.processes)

    @property
    def readers(self) -> list[Connection]:
        """Those from which something may come."""
        return [one.reader for one in self.processes if one.answer is None]

    def limit_s(self, timeout_s: float) -> float:
        return timeout_s if self.begun else START_S


def run(
    tasks: Iterable[Task],
    function: Callable[[Task], Result],
    *,
    workers: int,
    timeout_s: float,
    preload: Sequence[str] = (),
    processes: Callable[[Task], int] = lambda _: 1,
) -> Iterator[Outcome[Task, Result]]:
    """Outcomes in the order in which tasks end. `function` must be importable, its argument and result picklable.

    `preload` are modules that it imports when it runs: named here, they are imported once and not a process each.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, function.__module__, *preload])
    waiting, running = iter(tasks), list[_Running[Task]]()
    try:
        while True:
            while len(running) < workers and (task := next(waiting, None)) is not None:
                running.append(_start(context, task, function, processes(task)))
            if not running:
                return
            first = min(r.since + r.limit_s(timeout_s) for r in running)
            wait([reader for r in running for reader in r.readers], max(0.0, first - time.monotonic()))
            for one in [*running]:
                outcome = _outcome(one, timeout_s)
                if outcome is not None:
                    running.remove(one)
                    yield outcome
    finally:
        for one in running:
            _end(one)


def _start(context: Any, task: Task, function: Callable[[Task], Result], count: int) -> _Running[Task]:
    store, environment = None, dict[str, str]()
    if count > 1:
        from elastic_lsopt.training.processes import host

        store, environment = host(count)
    started = []
    for rank in range(count):
        reader, writer = context.Pipe(duplex=False)
        own = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)} if count > 1 else {}
        process = context.Process(target=_work, args=(writer, function, task, own), daemon=True)
        process.start()
        writer.close()  # the child holds the only end: where it dies, the reader sees the end of the file
        started.append(_Process(process, reader))
    return _Running(task, started, store, time.monotonic())


def _outcome(one: _Running[Task], timeout_s: float) -> Outcome[Task, Any] | None:
    """None: it runs still."""
    if any([process.listen() for process in one.processes]) and one.begun:  # of each: no `or`
        one.since = time.monotonic()
    seconds, answers = time.monotonic() - one.since, [process.answer for process in one.processes]
    result, failure = answers[0] or (None, None)
    lost = [(rank, answer[1]) for rank, answer in enumerate(answers) if answer is not None and answer[1] is not None]
    if lost:
        rank, why = lost[0]
        result, failure = None, why if len(answers) == 1 else f"{why} (process {rank} of {len(answers)})"
    elif None in answers:
        if seconds <= one.limit_s(timeout_s):
            return None
        result = None
        failure = f"it took longer than timeout_s={timeout_s:g}" if one.begun else f"it did not begin in {START_S:g} s"
    _end(one)
    return Outcome(one.task, result, failure, seconds)


def _end(one: _Running[Any]) -> None:
    for each in one.processes:
        each.process.kill()  # what it had to say is said
    for each in one.processes:
        each.process.join()
        each.reader.close()
    one.store = None


def _work(writer: Connection, function: Callable[[Any], Any], task: Any, environment: dict[str, str]) -> None:
    os.environ.update(environment)
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
