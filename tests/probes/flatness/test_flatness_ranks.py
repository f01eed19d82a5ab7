"""All flatness measures on real ranks: the same numbers at every world size, the weights where they were."""

from __future__ import annotations

from typing import Any

import pytest

CASE = "tests.cases.probes.flatness:measures"
PLAIN: dict[int, dict[str, list[float]]] = {}
"""Of one process, measured once a precision."""


def same(ranks: Any, kind: str, world: int, bits: int, within: float) -> None:
    if bits not in PLAIN:
        PLAIN[bits] = ranks(1).run(CASE, kind="plain", bits=bits)[0]
    for got in ranks(world).run(CASE, kind=kind, bits=bits):
        assert got["moved"] == [0.0]
        for name, numbers in PLAIN[bits].items():
            assert got[name] == pytest.approx(numbers, rel=within, abs=1e-12, nan_ok=True), name


@pytest.mark.parametrize(
    "kind,world",
    [
        ("fsdp2", 3),
        *(pytest.param(*way, marks=pytest.mark.full) for way in (("hsdp", 2), ("ddp", 2), ("fsdp2", 1), ("fsdp2", 2))),
    ],
)  # fmt: skip
def test_the_same_at_every_world_size(ranks: Any, kind: str, world: int) -> None:
    same(ranks, kind, world, bits=64, within=1e-9)


@pytest.mark.parametrize("kind", [pytest.param("zero1", marks=pytest.mark.full), "zero3"])
def test_the_same_on_zero(ranks: Any, kind: str) -> None:
    same(ranks, kind, 2, bits=32, within=1e-5)
