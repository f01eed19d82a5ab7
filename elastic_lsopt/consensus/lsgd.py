"""LSGD: replicas are pulled towards the one of them whose training loss is lowest, and nobody moves the leader.

    l = argmin_j of replica j's mean loss over its last `window` steps
    at an exchange    x_i <- (1 - pull) x_i + pull x_l
    in each step      x_i <- (1 - p) x_i + p x~,   p = prox / steps between exchanges,   x~ the x_l of the last one

Teng, Gao, Chalus, Choromanska, Goldfarb, Weller: "Leader Stochastic Gradient Descent for Distributed Training of Deep
Learning Models", NeurIPS 2019, arXiv 1905.10395. With `group` replicas on a node, exchanges are among those of a node,
towards its own leader, and each `global_every`-th of them is among all (their local and global leaders; g_comm is tau
times global_every). Unlike a mean, a leader is a point that was trained: a minimum of the loss stays where it is. Ties
go to the lowest number. The mean of the replicas is evaluated. Rest point: pull = prox = 0, independent runs.

Differs from the authors' code in: 1. the pull in each step comes before the base steps and not after it; 2. it is
towards the global leader alone (at first: where all began); 3. an exchange among all is not preceded by one
among those of a node; 4. one `pull` serves local and global leaders.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from elastic_lsopt.by_name import require, require_count
from elastic_lsopt.consensus.registry import register
from elastic_lsopt.consensus.replicas import Replicas
from elastic_lsopt.consensus.rule import Rule, loss_of, require_part, require_pull
from elastic_lsopt.facts import Facts
from elastic_lsopt.oracle.method import State
from elastic_lsopt.oracle.oracle import Oracle
from elastic_lsopt.oracle.step_report import StepReport
from elastic_lsopt.space.geometry import ParameterSpace


@register("lsgd")
@dataclass(frozen=True, kw_only=True)
class LSGD(Rule):
    """Cost: none beside the steps. Memory: one Vector, the leader's (prox = 0: none), and one within an exchange.
    Communication: one broadcast of a Vector and a number to all per exchange. Raises UserError for a value out of
    range, and for a method that tells no loss."""

    pull: float = 0.1
    """c, how far towards the leader at an exchange; >= 0 and <= 1. The paper: 0.1."""
    prox: float = 0.1
    """How far towards the last leader in all steps between two exchanges together; >= 0 and <= 1. The paper: 0.1."""
    window: int = 10
    """Steps whose losses are averaged; >= 1. The paper: 10 on CIFAR, 64 on ImageNet."""
    group: int = 1
    """Replicas of a node, next to each other by number; >= 1."""
    global_every: int = 1
    """Of so many exchanges one is among all, the others among those of a node; >= 1. The paper: 4."""

    in_few_bits: ClassVar[bool] = False
    facts: ClassVar[Facts] = Facts(
        paper="Teng et al. 2019, arXiv 1905.10395", passes="0", memory="1; 1 within an exchange",
        communication="a broadcast and a number per tau steps",
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        require_pull(self.pull)
        require_part("prox", self.prox)
        for name in ("window", "group", "global_every"):
            require_count(name, getattr(self, name))
        alone = self.group > 1 or self.global_every == 1
        require(alone, "global_every", self.global_every, "1 where group=1: there are no local leaders")

    @property
    def shared(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("leader",) if self.prox else ()

    def sent_vectors(self, replicas: int) -> float:
        return (replicas - 1) / replicas  # the leader's, to all others

    def init(self, space: ParameterSpace) -> State:
        return {"steps": 0, **({"leader": space.weights.clone()} if self.prox else {})}

    def after_step(self, space: ParameterSpace, report: StepReport, state: dict[str, Any]) -> None:
        state[f"loss/{state['steps'] % self.window}"] = loss_of(report, "lsgd")
        state["steps"] += 1

    def move(self, space: ParameterSpace, state: dict[str, Any]) -> None:
        """Before the base steps."""
        if self.prox:
            space.weights.lerp_(state["leader"], self.prox / (self.tau * self.global_every))

    def exchange(self, replicas: Replicas, space: ParameterSpace, oracle: Oracle | None, state: dict[str, Any]) -> Any:
        losses = [state[f"loss/{i}"] for i in range(self.window) if f"loss/{i}" in state]
        told = replicas.numbers(math.fsum(losses) / len(losses) if losses else math.inf)[:, 0].tolist()
        everywhere = (replicas.last + 1) % self.global_every == 0
        among = [m for m in replicas.members if everywhere or m // self.group == replicas.number // self.group]
        loss, leader = min((told[replicas.members.index(m)], m) for m in among)
        return everywhere, replicas.of(space.weights, leader, among) if loss < math.inf else None

    def settle(self, heard: Any, space: ParameterSpace, state: dict[str, Any]) -> None:
        everywhere, leader = heard
        if leader is None:  # nobody has trained yet
            return
        if everywhere and self.prox:
            state["leader"].copy_(leader)
        space.weights.lerp_(leader, self.pull)
