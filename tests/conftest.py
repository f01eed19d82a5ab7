"""Shared by all tests: groups of real processes, one a world size for the whole session."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.ranks import Ranks


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[[int], Ranks]]:
    """`ranks(world).run("tests.cases.module:function", …)`: see tests/ranks.py."""
    groups: dict[int, Ranks] = {}

    def of(world: int) -> Ranks:
        return groups.setdefault(world, Ranks(world))

    yield of
    for group in groups.values():
        group.stop()
