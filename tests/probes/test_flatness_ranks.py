"""All flatness measures on real ranks: the same numbers at every world size, the weights where they were."""

from __future__ import annotations

from typing import Any

import pytest


def test_the_same_at_every_world_size(ranks: Any) -> None:
    case = "tests.cases.flatness:measures"
    one = ranks(1).run(case, kind="plain")[0]
    for world in (1, 2, 3):
        for got in ranks(world).run(case, kind="fsdp2"):
            assert got["moved"] == [0.0]
            for name, numbers in one.items():
                assert got[name] == pytest.approx(numbers, rel=1e-9, abs=1e-12, nan_ok=True), (name, world)
