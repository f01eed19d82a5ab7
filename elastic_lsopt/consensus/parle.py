"""Parle: replicas of Entropy-SGD that an elastic force holds together, harder and harder.

    x_i <- base step with (x_i - m_i) + rho_t (x_i - x_bar)            m_i: where Entropy-SGD's walk was in the mean
    x_bar  the mean of all x_i at the last exchange;   rho_t = min(rho0 (1 + rho1)^t, 10)

Chaudhari, Baldassi, Zecchina, Soatto, Talwalkar, Oberman: "Parle: parallelizing stochastic gradient descent", arXiv
1707.00424, equations 8. The walk, and the scoping of its own pull, are those of the method `entropy_sgd`, L of the
paper its `inner_steps`; rho is one over the paper's. The mean is evaluated. Rest points: rho0 = 0, independent
Entropy-SGD; with one inner step and no pull in the walk, EASGD's force with the mean as its centre.

Differs from the authors' code in: 1. there is one mean, of the x_i, as in the paper; their code takes one of the m_i
too; 2. the force begins at rho0, as in the paper, where their code begins at 0.01 L n; t are own steps in both. Each
replica counts alike, whatever its samples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from elastic_lsopt.by_name import require_number
from elastic_lsopt.consensus.registry import register
from elastic_lsopt.consensus.replicas import Replicas
from elastic_lsopt.consensus.rule import Rule, equal
from elastic_lsopt.facts import Facts
from elastic_lsopt.oracle.method import State
from elastic_lsopt.oracle.oracle import Oracle
from elastic_lsopt.oracle.step_report import StepReport
from elastic_lsopt.space.geometry import ParameterSpace
from elastic_lsopt.space.vector import Vector

MOST = 10.0
"""The largest force; the paper's."""


@register("parle")
@dataclass(frozen=True, kw_only=True)
class Parle(Rule):
    """Cost: none beside Entropy-SGD's. Memory: one Vector, the mean; two more within an exchange. Communication: one
    reduction of a Vector per exchange. Raises UserError for a value out of range, and where the method is not
    entropy_sgd."""

    tau: int = 1
    """Steps of Entropy-SGD from one exchange to the next; >= 1. The paper: 1."""
    rho0: float = 1.0
    """The force at the start; >= 0. The paper: 1."""
    rho1: float = 0.001
    """Its growth per step, up to 10 (or rho0, if that is more); >= 0. The paper: 1 over twice the batches of an epoch.
    """

    shared: ClassVar[tuple[str, ...]] = ("mean", "steps")
    needs_method: ClassVar[str] = "entropy_sgd"
    facts: ClassVar[Facts] = Facts(
        paper="Chaudhari et al. 2017, arXiv 1707.00424", passes="0", memory="1; 2 within an exchange",
        communication="a reduction per tau steps", needs="the method entropy_sgd",
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("rho0", "rho1"):
            require_number(name, getattr(self, name))

    def init(self, space: ParameterSpace) -> State:
        return {"mean": space.weights.clone(), "steps": 0}

    def pulled(self, space: ParameterSpace, gradient: Vector, state: dict[str, Any]) -> Vector:
        rho = self._rho(state["steps"])
        return gradient.clone().add_(space.weights, alpha=rho).add_(state["mean"], alpha=-rho)

    def _rho(self, steps: int) -> float:
        if not self.rho0:
            return 0.0
        most = max(MOST, self.rho0)  # by logarithms, as the power of a long run is larger than any float
        return self.rho0 * math.exp(min(steps * math.log1p(self.rho1), math.log(most / self.rho0)))

    def after_step(self, space: ParameterSpace, report: StepReport, state: dict[str, Any]) -> None:
        state["steps"] += 1

    def exchange(
        self, replicas: Replicas, space: ParameterSpace, oracle: Oracle | None, state: dict[str, Any]
    ) -> Vector:
        return replicas.mean(space.weights, equal(replicas))

    def settle(self, heard: Vector, space: ParameterSpace, state: dict[str, Any]) -> None:
        state["mean"].copy_(heard)
