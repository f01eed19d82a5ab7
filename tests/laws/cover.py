"""Combinations of settings: the full product, and a seeded pairwise cover of it.

A pairwise cover holds, for any two settings, every pair of their values that is possible at all in some combination.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import pytest

KINDS = ("plain", "ddp", "fsdp2", "fsdp2-kept", "hsdp", "zero0", "zero1", "zero2", "zero3")
METHODS = ("none", "sam", "asam", "lpf_sgd")
FAMILY = (
    "gsam", "looksam", "friendly_sam", "wsam", "momentum_sam", "m_sam", "esam", "ae_sam", "sampa", "random_sam",
    "functional_sam", "rwp", "entropy_sgd",
)  # fmt: skip
SHARDINGS = ("ddp", "fsdp2", "zero2", "zero3")
"""With which each of the family is paired in `make test`; the other kinds are in the full product."""
WORLDS = (1, 2, 3)
ACCUMULATION = (1, 3)
CLIP = (0.0, 0.5)


@dataclass(frozen=True)
class Combination:
    kind: str
    method: str
    world: int
    accumulation: int
    clip: float

    @property
    def possible(self) -> bool:
        return self.world == 1 if self.kind == "plain" else True

    def __str__(self) -> str:
        return f"{self.kind}-{self.method}-world{self.world}-accumulate{self.accumulation}-clip{self.clip}"


def product(methods: Sequence[str] = METHODS, kinds: Sequence[str] = KINDS) -> list[Combination]:
    """Every possible combination."""
    everything = itertools.product(kinds, methods, WORLDS, ACCUMULATION, CLIP)
    return [c for c in itertools.starmap(Combination, everything) if c.possible]


def pairs(c: Combination) -> set[Any]:
    return _groups(astuple(c), 2)


def pairwise(combinations: Sequence[Combination], seed: int) -> list[Combination]:
    """A small choice that holds every pair: greedily the combination with most new pairs, ties by the seed."""
    rows = {astuple(c): c for c in combinations}
    chosen = [rows[row] for row in _cover(list(rows), 2, seed)]
    return sorted(chosen, key=lambda c: (c.world, c.kind, c.method))


def daily(*axes: Iterable[Any], together: int = 1, seed: int = 0) -> list[Any]:
    """The product of the axes as parameters of a test, of which `make test` runs a small part that holds every value
    (`together=2`: every pair of values), and `make test-all` the rest. A tuple is several parameters, one value."""
    return daily_of(list(itertools.product(*map(list, axes))), together=together, seed=seed)


def daily_of(
    rows: Sequence[tuple[Any, ...]], *, together: int = 1, seed: int = 0, fast: Callable[..., bool] = lambda *row: False
) -> list[Any]:
    """`daily` of rows that are not a whole product; those that are `fast` are all in `make test`, and marked so."""
    keys = [tuple(map(str, row)) for row in rows]
    chosen = set(_cover(keys, together, seed))
    out = []
    for row, key in zip(rows, keys, strict=True):
        flat = [v for value in row for v in (value if isinstance(value, tuple) else (value,))]
        mark = pytest.mark.fast if fast(*flat) else () if key in chosen else pytest.mark.full
        out.append(pytest.param(*flat, marks=mark))
    return out


def full_but(everyday: Sequence[tuple[Any, ...]], *axes: Iterable[Any]) -> list[Any]:
    """The product of the axes as parameters of a test, of which `make test` runs the `everyday` rows and `make
    test-all` the rest. A tuple of an axis is several parameters."""
    rows = [
        tuple(v for value in row for v in (value if isinstance(value, tuple) else (value,)))
        for row in itertools.product(*map(list, axes))
    ]
    assert all(row in rows for row in everyday), everyday
    return [pytest.param(*row, marks=() if row in everyday else pytest.mark.full) for row in rows]


def joined(value: Any) -> str | None:
    """A list's name among the ids of a test."""
    return "+".join(value) if isinstance(value, list) else None


def _cover(rows: Sequence[tuple[Any, ...]], together: int, seed: int) -> list[tuple[Any, ...]]:
    rest = list(rows)
    random.Random(seed).shuffle(rest)
    left = set().union(*(_groups(row, together) for row in rest))
    chosen = []
    while left:
        best = max(rest, key=lambda row: len(_groups(row, together) & left))
        chosen.append(best)
        left -= _groups(best, together)
    return chosen


def _groups(row: tuple[Any, ...], together: int) -> set[Any]:
    return set(itertools.combinations(enumerate(row), together))
