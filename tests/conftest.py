"""Shared by all tests: lanes, and groups of real processes, one a world size for the whole session."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.ranks import Ranks


def pytest_configure(config: pytest.Config) -> None:
    if lane := os.environ.get("PYTEST_XDIST_WORKER"):
        from tests import lanes, warm

        lanes.enter(lane)
        warm.start_server()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from tests.lanes import Lanes

    return Lanes(config, log)


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[[int], Ranks]]:
    """`ranks(world).run("tests.cases.module:function", …)`: see tests/ranks.py."""
    groups: dict[int, Ranks] = {}

    def of(world: int) -> Ranks:
        return groups.setdefault(world, Ranks(world))

    yield of
    for group in groups.values():
        group.stop()
