"""DiLoCo: many steps of an inner optimizer, then one step of an outer one along the mean of what they did.

    D = x_old - sum_i s_i x_i / sum_i s_i;   v <- m v + D;   x <- x_old - eta (D + m v);   x_i <- x for all i

Douillard, Feng, Rusu, Chhaparia, Donchev, Kuncoro, Ranzato, Szlam, Shen: "DiLoCo: Distributed Low-Communication
Training of Language Models", arXiv 2311.08105, algorithm 1: inner AdamW, whose state stays with its replica, outer SGD
with Nesterov's momentum. The outer point x is evaluated. Rest point: lr = 1 and momentum = 0, local SGD.

Differs from the paper in: replicas that took more samples count more (s_i), where some are slower or came later.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from elastic_lsopt.by_name import require_number, require_share
from elastic_lsopt.consensus.registry import register
from elastic_lsopt.consensus.replicas import Replicas
from elastic_lsopt.consensus.rule import Rule, by_samples
from elastic_lsopt.facts import Facts
from elastic_lsopt.oracle.method import State
from elastic_lsopt.oracle.oracle import Oracle
from elastic_lsopt.space.geometry import ParameterSpace
from elastic_lsopt.space.vector import Vector


@register("diloco")
@dataclass(frozen=True, kw_only=True)
class DiLoCo(Rule):
    """Cost: none beside the steps. Memory: two Vectors, 1/N of them per rank; three more within an exchange.
    Communication: one reduction of a Vector per exchange. Raises UserError for a value out of range."""

    lr: float = 0.7
    """eta, of the outer step; > 0. The paper: 0.7."""
    momentum: float = 0.9
    """m, Nesterov's; >= 0 and < 1. The paper: 0.9."""
    tau: int = 500
    """Inner steps; >= 1. The paper: 500."""

    shared: ClassVar[tuple[str, ...]] = ("old", "v")
    facts: ClassVar[Facts] = Facts(
        paper="Douillard et al. 2023, arXiv 2311.08105", passes="0", memory="2; 3 within an exchange",
        communication="a reduction per tau steps",
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number("lr", self.lr, positive=True)
        require_share("momentum", self.momentum)

    def init(self, space: ParameterSpace) -> State:
        return {"old": space.weights.clone(), "v": space.zeros()}

    def exchange(
        self, replicas: Replicas, space: ParameterSpace, oracle: Oracle | None, state: dict[str, Any]
    ) -> Vector:
        return replicas.sum(state["old"] - space.weights, by_samples(replicas)[replicas.place])

    def settle(self, heard: Vector, space: ParameterSpace, state: dict[str, Any]) -> None:
        self.step(state["old"], state["v"], heard)
        space.weights.copy_(state["old"])

    def step(self, old: Vector, v: Vector, delta: Vector) -> None:
        """The outer one, in place."""
        v.mul_(self.momentum).add_(delta)
        old.add_(delta, alpha=-self.lr).add_(v, alpha=-self.lr * self.momentum)

    def point(self, replicas: Replicas, space: ParameterSpace, state: State) -> Vector:
        old = state["old"]
        assert isinstance(old, Vector)
        return old.clone()
