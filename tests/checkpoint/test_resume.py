"""Law 4: saved, loaded, continued equals never stopped; bit-exact on the same layout, 1e-6 on any other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

CASES = "tests.cases.checkpoint:"


def furthest(a: dict[str, list[float]], b: dict[str, list[float]]) -> float:
    assert a.keys() == b.keys()
    return max(abs(x - y) for name in a for x, y in zip(a[name], b[name], strict=True))


def law_4(ranks: Any, tmp_path: Path, saved: tuple[str, int], loaded: tuple[str, int], **more: Any) -> float:
    """max |dw| at step 6 between never stopped on `saved` and continued from step 3 on `loaded`."""
    (kind, world), (other, other_world) = saved, loaded
    never_stopped = ranks(world).run(CASES + "save_midway", path=str(tmp_path), kind=kind, **more)[0]
    continued = ranks(other_world).run(CASES + "resume_and_finish", path=str(tmp_path), kind=other, **more)
    return max(furthest(never_stopped, mine) for mine in continued)


@pytest.mark.parametrize("base", ["momentum", "adamw", "drifting"])
@pytest.mark.parametrize("layout", [("plain", 1), ("ddp", 2), ("fsdp2", 2), ("fsdp2", 3), ("hsdp", 2)])
def test_the_same_layout_goes_on_bit_by_bit(ranks: Any, tmp_path: Path, layout: tuple[str, int], base: str) -> None:
    assert law_4(ranks, tmp_path, layout, layout, base=base) == 0.0
