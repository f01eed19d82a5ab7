"""Local SGD: every tau steps all replicas begin anew from their mean.

    x_i <- (1 - c) x_i + c x_bar          x_bar = sum_j s_j x_j / sum_j s_j,   s_j: samples since the last exchange

Stich: "Local SGD Converges Fast and Communicates Little", ICLR 2019, arXiv 1805.09767, where c = 1. The mean is
evaluated. Rest point: c = 0, independent runs; tau = 1 and c = 1 under plain SGD is synchronous data parallelism.

Differs from the paper in: 1. replicas that took more samples count more; 2. c below 1 is soft averaging.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from elastic_lsopt.consensus.registry import register
from elastic_lsopt.consensus.replicas import Replicas
from elastic_lsopt.consensus.rule import Rule, by_samples, require_pull
from elastic_lsopt.facts import Facts
from elastic_lsopt.oracle.method import State
from elastic_lsopt.oracle.oracle import Oracle
from elastic_lsopt.space.geometry import ParameterSpace
from elastic_lsopt.space.vector import Vector


@register("local_sgd")
@dataclass(frozen=True, kw_only=True)
class LocalSGD(Rule):
    """Cost: none beside the steps. Memory: two Vectors within an exchange. Communication: one reduction of a Vector per
    exchange. Raises UserError for a value out of range."""

    pull: float = 1.0
    """c, how far towards the mean; >= 0 and <= 1."""

    facts: ClassVar[Facts] = Facts(
        paper="Stich 2019, arXiv 1805.09767", passes="0", memory="0; 2 within an exchange",
        communication="a reduction per tau steps",
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        require_pull(self.pull)

    def exchange(
        self, replicas: Replicas, space: ParameterSpace, oracle: Oracle | None, state: dict[str, Any]
    ) -> Vector:
        return replicas.mean(space.weights, by_samples(replicas))

    def settle(self, heard: Vector, space: ParameterSpace, state: dict[str, Any]) -> None:
        space.weights.lerp_(heard, self.pull)

    def point(self, replicas: Replicas, space: ParameterSpace, state: State) -> Vector:
        return replicas.mean(space.weights, by_samples(replicas))
