"""No method: the base optimizer alone, through the same engine (the rest point of all others)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from elastic_lsopt.facts import Facts
from elastic_lsopt.optimizers.registry import register
from elastic_lsopt.oracle.method import State
from elastic_lsopt.oracle.oracle import Oracle
from elastic_lsopt.space.geometry import ParameterSpace
from elastic_lsopt.space.vector import Vector


@register("none")
@dataclass(frozen=True, kw_only=True)
class Plain:
    """The gradient as it is. Cost: one pass, no memory."""

    facts: ClassVar[Facts] = Facts(paper="")

    parts = 1

    def init(self, space: ParameterSpace) -> State:
        return {}

    def gradient(self, space: ParameterSpace, oracle: Oracle, state: State) -> Vector:
        return oracle.gradient()
