"""LSGD: replicas are pulled towards the one of them whose training loss is lowest, and nobody moves the leader.

    l = argmin_j of replica j's mean loss over its last `window` steps
    at an exchange    x_i <- (1 - pull) x_i + pull x_l
    in each step      x_i <- (1 - p) x_i + p x~,   p = prox / steps between exchanges,   x~ the x_l of the last exchange

Teng, Gao, Chalus, Choromanska, Goldfarb, Weller: "Leader Stochastic Gradient Descent for Distributed Training of Deep
Learning Models", NeurIPS 2019, arXiv 1905.10395. With `group` replicas on a node, exchanges are among those of a node,
towards its own leader, and each `global_every`-th of them is among all (their local and global leaders; g_comm is tau
times global_every). Unlike a mean, a leader is a point that was trained: a minimum of the loss stays where it is.
Rest point: pull = prox = 0, independent runs.

Differs from the authors' code in: 1. ties go to the replica with the lowest number; 2. the pull in each step comes
before the base steps and not after it; 3. it is towards the global leader alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from elastic_lsopt.by_name import require, require_count
from elastic_lsopt.consensus.registry import register
from elastic_lsopt.consensus.replicas import Replicas
from elastic_lsopt.consensus.rule import Rule, require_pull
from elastic_lsopt.facts import Facts
from elastic_lsopt.oracle.method import State
from elastic_lsopt.oracle.oracle import Oracle
from elastic_lsopt.oracle.step_report import StepReport
from elastic_lsopt.space.geometry import ParameterSpace
from elastic_lsopt.space.vector import Vector


@register("lsgd")
@dataclass(frozen=True, kw_only=True)
class LSGD(Rule):
    """Cost: none beside the steps. Memory: one Vector, the leader's (prox = 0: none). Communication: one broadcast of
    a Vector and one of a number per exchange. Raises UserError for a value out of range."""

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

    facts: ClassVar[Facts] = Facts(
        paper="Teng et al. 2019, arXiv 1905.10395", passes="0", memory="1; 2 within an exchange",
        communication="a broadcast and a number per tau steps",
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        require_pull(self.pull)
        share = isinstance(self.prox, int | float) and 0 <= self.prox <= 1
        require(share, "prox", self.prox, "a number >= 0 and <= 1")
        for name in ("window", "group", "global_every"):
            require_count(name, getattr(self, name))
        alone = self.group > 1 or self.global_every == 1
        require(alone, "global_every", self.global_every, "1 where group=1: there are no local leaders")

    def init(self, space: ParameterSpace) -> State:
        return {"steps": 0, "known": 0, **({"leader": space.zeros()} if self.prox else {})}

    def after_step(self, space: ParameterSpace, report: StepReport, state: dict[str, Any]) -> None:
        state[f"loss/{state['steps'] % self.window}"] = report.loss
        state["steps"] += 1

    def move(self, space: ParameterSpace, state: dict[str, Any]) -> None:
        """Before the base steps."""
        if self.prox and state["known"]:
            space.weights.lerp_(state["leader"], self.prox / (self.tau * self.global_every))

    def exchange(self, replicas: Replicas, space: ParameterSpace, oracle: Oracle, state: dict[str, Any]) -> Any:
        losses = [state[f"loss/{i}"] for i in range(self.window) if f"loss/{i}" in state]
        told = replicas.numbers(math.fsum(losses) / len(losses) if losses else math.inf)[:, 0].tolist()
        everywhere = (replicas.last + 1) % self.global_every == 0
        among = [m for m in replicas.members if everywhere or m // self.group == replicas.number // self.group]
        leader = min(among, key=lambda m: (_rank(told[replicas.members.index(m)]), m))
        return everywhere, replicas.of(space.weights, leader, among)

    def settle(self, heard: Any, space: ParameterSpace, state: dict[str, Any]) -> None:
        everywhere, leader = heard
        if everywhere and self.prox:
            state["leader"].copy_(leader)
            state["known"] = 1
        space.weights.lerp_(leader, self.pull)

    def point(self, replicas: Replicas, space: ParameterSpace, state: State) -> Vector:
        return replicas.mean(space.weights, [1 / len(replicas.members)] * len(replicas.members))


def _rank(loss: float) -> float:
    return loss if math.isfinite(loss) else math.inf
