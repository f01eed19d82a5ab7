"""Processes of a pool: all tasks' results, and what is said of those that fail, hang, die or are too large."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from elastic_lsopt.study.pool import run
from tests.study.pool_tasks import as_rank, behave

ROOT = Path(__file__).parents[2]


def outcomes(tasks, **settings):
    return {o.task: o for o in run(tasks, behave, **{"workers": 2, "timeout_s": 60.0} | settings)}


def test_each_task_has_a_process_of_one_thread_and_as_many_run_as_there_are_workers():
    outcomes(["good"])  # the server that forks is there
    tasks, began = [f"sleep 1.{i}" for i in range(4)], time.monotonic()
    found = outcomes(tasks, workers=4)
    assert sum(o.seconds for o in found.values()) > 1.5 * (time.monotonic() - began)
    assert {o.result[0] for o in found.values()} == set(tasks)
    assert len({o.result[1] for o in found.values()} | {os.getpid()}) == 5
    assert {o.result[2] for o in found.values()} == {1}
    assert all(o.failure is None for o in found.values())


def test_failures_are_told_and_harm_no_other():
    found = outcomes(["raise", "die", "good", "leave", "fine", "hang", "beside it"], timeout_s=10.0)
    assert {task: o.failure for task, o in found.items()} == {
        "raise": "ValueError: no such luck",
        "die": "its process was killed by SIGKILL",
        "leave": "its process ended with code 3",
        "hang": "it took longer than timeout_s=10",
        "good": None, "fine": None, "beside it": None,
    }  # fmt: skip
    assert found["good"].result[0] == "good"
    assert 10 <= found["hang"].seconds < 50


def test_a_task_of_several_processes_is_the_firsts_and_fails_with_any():
    began = time.monotonic()
    found = {o.task: o for o in run(["all", "0", "2"], as_rank, workers=3, timeout_s=60.0, processes=lambda _: 3)}
    assert found["all"].result == ("0", "3") and found["all"].failure is None
    assert {task: found[task].failure for task in "02"} == {
        rank: f"ValueError: no such luck (process {rank} of 3)" for rank in "02"
    }
    assert time.monotonic() - began < 50, "those that wait for it are ended"


def test_a_tasks_time_is_its_own():
    """Its process has to import for longer than the limit is: the server that forks was there before."""
    outcomes(["good"])
    from tests.study.slow_to_import import at_once

    began = time.monotonic()
    [found] = run(["quick"], at_once, workers=1, timeout_s=2.4)
    assert found.failure is None and found.seconds < 2.4
    assert time.monotonic() - began > 2.5


def test_no_process_is_left_when_the_caller_stops():
    running = run(["quick", "hang 1", "hang 2"], behave, workers=3, timeout_s=60)
    assert next(running).task == "quick"
    began = time.monotonic()
    running.close()
    assert time.monotonic() - began < 5


PARENT = """
import sys
from elastic_lsopt.study.pool import run
from tests.study.pool_tasks import say_and_wait
if __name__ == "__main__":
    list(run([sys.argv[1]], say_and_wait, workers=1, timeout_s=60))
"""


def test_a_process_ends_with_its_killed_parent(tmp_path):
    (tmp_path / "parent.py").write_text(PARENT)
    told = tmp_path / "pid"
    with subprocess.Popen(
        [sys.executable, str(tmp_path / "parent.py"), str(told)], env=os.environ | {"PYTHONPATH": "."}
    ) as parent:
        until = time.monotonic() + 60
        while not (told.exists() and told.read_text()) and time.monotonic() < until:
            time.sleep(0.1)
        child = int(told.read_text())
        parent.kill()
    until = time.monotonic() + 10
    with suppress(ProcessLookupError):
        while time.monotonic() < until:
            os.kill(child, 0)
            time.sleep(0.05)
        pytest.fail("the process lives on")
