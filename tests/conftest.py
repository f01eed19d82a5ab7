"""Shared by all tests: lanes, and groups of real processes, one a world size for the whole session."""

from __future__ import annotations

import gc
import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from tests import lanes
from tests.processes import warm
from tests.processes.ranks import Ranks
from tests.resume import Results

PYTESTS_OWN = "PYTEST_CURRENT_TEST"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: the lanes have a core each, and would fight for both


hypothesis.settings.register_profile("suite", deadline=None)  # by the wall's clock, which a busy machine does not keep
hypothesis.settings.load_profile("suite")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", help="note what passes in this file, and leave out what has passed: tests/resume.py")


def pytest_configure(config: pytest.Config) -> None:
    lane = os.environ.get("PYTEST_XDIST_WORKER")
    if file := config.getoption("--results"):
        config.pluginmanager.register(Results(Path(file), writes=lane is None))
    if lane:
        lanes.enter(lane)
    elif config.getoption("numprocesses", None):
        warm.start_server()  # for all lanes: it imports while they collect


def pytest_collection_finish() -> None:
    """What imports and collection have made stays: a garbage collection, and who asks for an object's owners, need not
    look through it again and again."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    return lanes.Lanes(config, log)


@pytest.fixture(autouse=True)
def environment_as_it_was() -> Iterator[None]:
    """A command sets variables for its own process, DeepSpeed LOCAL_RANK; left there, they change how the next tests'
    processes start, and accelerate takes its own for a rank."""
    before = {**os.environ}
    yield
    for name in os.environ.keys() - before.keys() - {PYTESTS_OWN}:
        del os.environ[name]
    os.environ.update({name: value for name, value in before.items() if name != PYTESTS_OWN})


@pytest.fixture(autouse=True)
def process_as_it_was() -> Iterator[None]:
    """A command tells the package's log where to go, and an engine of DeepSpeed opens a process group: the next test
    has neither."""
    log = logging.getLogger("elastic_lsopt")
    before = [*log.handlers], log.propagate, log.level
    began = _has_group()
    yield
    log.handlers[:], log.propagate, level = before
    log.setLevel(level)
    if _has_group() and not began:
        sys.modules["torch.distributed"].destroy_process_group()


def _has_group() -> bool:
    """Of this process; without importing torch, which many tests do not need."""
    return "torch.distributed" in sys.modules and sys.modules["torch.distributed"].is_initialized()


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[[int], Ranks]]:
    """`ranks(world).run("tests.cases.module:function", …)`: see tests/processes/ranks.py."""
    groups: dict[int, Ranks] = {}

    def of(world: int) -> Ranks:
        return groups.setdefault(world, Ranks(world))

    yield of
    for group in groups.values():
        group.stop()
