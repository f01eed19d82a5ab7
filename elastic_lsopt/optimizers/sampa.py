"""SAMPa: SAM whose two gradients do not wait for each other, because one is taken at a point that is known beforehand.

    x~ = x + rho h / ||h||                h the gradient that the step before took at y
    y' = x - eta h                        where SGD alone would go
    x <- base step with (1 - lam) grad L(x~) + lam grad L(y');   h = grad L(y')

Xie, Pethick, Cevher: "SAMPa: Sharpness-aware Minimization Parallelized", NeurIPS 2024, arXiv 2410.10683, Algorithm 1.
The first step takes h at x, at one pass more. Rest point: rho = lam = 0, which is the base.

`halves` is what the paper is for: the first half of the ranks stands at x~, the second at y', and each runs the whole
batch. It halves the time of a step of m micro-batches where m <= N / 2, since one pass after the other leaves ranks
without work; where m >= N the work per rank is the same, and what is saved is reductions and waiting.

Differs from the authors' code in: both gradients are of the step's own batch, where they take x~'s on the batch before.
As the code, y' has the base's momentum and decay, so the base must be SGD.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from elastic_lsopt.by_name import require
from elastic_lsopt.facts import Facts
from elastic_lsopt.optimizers.ascent import Ascent
from elastic_lsopt.optimizers.registry import register
from elastic_lsopt.optimizers.scheduled import Scheduled
from elastic_lsopt.oracle.base import Need
from elastic_lsopt.oracle.method import State
from elastic_lsopt.oracle.oracle import Oracle
from elastic_lsopt.space.geometry import ParameterSpace
from elastic_lsopt.space.vector import Vector


@register("sampa")
@dataclass(frozen=True, kw_only=True)
class SAMPa(Ascent):
    """Cost: two passes; three in the first step. Memory: one Vector, 1/N per rank; SAM's and one more within the step.

    Communication: one all-reduce of a number. With `halves`, of P parameters on N ranks: one reduction of P numbers
    within N / 2 ranks, and one message of P, in place of two reductions within N.
    Raises UserError for a value out of range, or a base that is not SGD; Unsupported for halves of an odd number of
    ranks, or where a rank does not hold all weights.
    """

    rho: Scheduled = 0.1
    """L2 radius; >= 0, or a schedule. The paper: 0.1."""
    lam: float = 0.2
    """Weight of the gradient at y'; in [0, 1]. The paper: 0.2."""

    halves: bool = False
    """Both gradients at once, each on half of the ranks, which hold all weights; own loops deal by `engine.deal`."""

    facts: ClassVar[Facts] = Facts(
        paper="Xie et al. 2024, arXiv 2410.10683", passes="2", memory="1; 3 within the step",
        communication="an all-reduce of a number", needs="SGD as base",
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        require(isinstance(self.lam, int | float) and 0 <= self.lam <= 1, "lam", self.lam, "a number in [0, 1]")
        require(isinstance(self.halves, bool), "halves", self.halves, "true or false")
        require(self.every == 1, "every", self.every, "1: each step's gradient serves the next")
        require(self.precondition == "none", "precondition", self.precondition, "none: the base is SGD")

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"sgd"})

    def init(self, space: ParameterSpace) -> State:
        return {**super().init(space), "ahead": space.zeros(), "begun": 0}

    def gradient(self, space: ParameterSpace, oracle: Oracle, state: dict[str, Any]) -> Vector:
        assert oracle.base is not None
        h: Vector = state["ahead"]
        if not state["begun"]:
            h.copy_(oracle.gradient())
            state["begun"] = 1
        if self.halves:
            with self.up(space, oracle, h) if oracle.half == 0 else space.perturbed(oracle.base.sgd_step(h), -1.0):
                total, ahead = oracle.gradients_of_halves()
            h.copy_(ahead)
            return total.mul_(1 - self.lam).add_(h, alpha=self.lam)
        with self.up(space, oracle, h):
            total = oracle.gradient().clone().mul_(1 - self.lam)
        with space.perturbed(oracle.base.sgd_step(h), -1.0):
            h.copy_(oracle.gradient())
        return total.add_(h, alpha=self.lam)
