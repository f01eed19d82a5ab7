"""Whichever door a user comes in by, six updates of SAM end at the paper's weights."""

from __future__ import annotations

from typing import Any

import pytest

from tests.cases.doors import DOORS


@pytest.mark.parametrize("world", [pytest.param(1, marks=pytest.mark.full), 2])
def test_all_doors_give_the_papers_weights(ranks: Any, world: int) -> None:
    for r in ranks(world).run("tests.cases.doors:apart", timeout_s=150):
        assert set(r) == set(DOORS) and max(r.values()) < 1e-6, r
