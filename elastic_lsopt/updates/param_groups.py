"""Parameter groups by patterns of names: which parameter takes which update, at which rate.

    - {match: "*.weight", dims: 2, optim: muon, learning_rate: 0.02}       the first rule that matches counts
    - {match: ["*norm*", "*.bias"], weight_decay: 0}

A pattern is a shell's: * matches anything, dots too. Pure functions: names and numbers of dimensions in, numbers out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any


@dataclass(frozen=True)
class Rule:
    """Parameters whose name matches one of `match` (and that have `dims` dimensions) take `options`."""

    match: tuple[str, ...]
    dims: int | None
    options: tuple[tuple[str, Any], ...]

    def holds(self, name: str, dims: int) -> bool:
        return (self.dims is None or dims == self.dims) and any(fnmatchcase(name, pattern) for pattern in self.match)


def assign(parameters: Iterable[tuple[str, int]], rules: Sequence[Rule]) -> list[int | None]:
    """For each (name, number of dimensions) the first rule that holds, None where none does."""
    return [next((i for i, rule in enumerate(rules) if rule.holds(name, dims)), None) for name, dims in parameters]


def unused(parameters: Iterable[tuple[str, int]], rules: Sequence[Rule]) -> list[Rule]:
    """Rules that no parameter takes: mistakes of spelling, as a rule."""
    taken = {i for i in assign(parameters, rules) if i is not None}
    return [rule for i, rule in enumerate(rules) if i not in taken]
