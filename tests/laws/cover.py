"""Combinations of settings: the full product, and a seeded pairwise cover of it.

A pairwise cover holds, for any two settings, every pair of their values that is possible at all in some combination.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import astuple, dataclass

KINDS = ("plain", "ddp", "fsdp2", "fsdp2-kept", "hsdp", "zero0", "zero1", "zero2", "zero3")
METHODS = ("none", "sam", "asam", "lpf_sgd")
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


def product() -> list[Combination]:
    """Every possible combination."""
    everything = itertools.product(KINDS, METHODS, WORLDS, ACCUMULATION, CLIP)
    return [c for c in itertools.starmap(Combination, everything) if c.possible]


def pairs(c: Combination) -> set[tuple[tuple[int, object], tuple[int, object]]]:
    return set(itertools.combinations(enumerate(astuple(c)), 2))


def pairwise(combinations: Sequence[Combination], seed: int) -> list[Combination]:
    """A small choice that holds every pair: greedily the combination with most new pairs, ties by the seed."""
    rest = list(combinations)
    random.Random(seed).shuffle(rest)
    left = set().union(*(pairs(c) for c in rest))
    chosen = []
    while left:
        best = max(rest, key=lambda c: len(pairs(c) & left))
        chosen.append(best)
        left -= pairs(best)
    return sorted(chosen, key=lambda c: (c.world, c.kind, c.method))
