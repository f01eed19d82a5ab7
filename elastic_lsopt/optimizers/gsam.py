"""GSAM: SAM that also lowers the surrogate gap, by the part of the plain gradient that SAM's does not need.

    g  = grad L(w),  s = grad L(w + e)             e as SAM's
    p  = g - <g, s> / ||s||^2 s                    what of g is perpendicular to s
    w <- base step with s - alpha p

Zhuang, Gong, Yuan, Cui, Adam, Dvornek, Tatikonda, Duncan, Liu: "Surrogate Gap Minimization Improves Sharpness-Aware
Training", ICLR 2022, arXiv 2203.08065, Algorithm 1. Rest point: alpha = 0, which is SAM.

The paper lets rho follow the learning rate; here rho has a schedule of its own on the sample clock, such as
{start: 0.1, end: 0.02, shape: cosine}. The authors decompose each accelerator's gradients, here those of the batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from elastic_lsopt.by_name import require_number
from elastic_lsopt.facts import Facts
from elastic_lsopt.optimizers.ascent import Ascent
from elastic_lsopt.optimizers.registry import register
from elastic_lsopt.oracle.method import State
from elastic_lsopt.oracle.oracle import Oracle
from elastic_lsopt.space.geometry import ParameterSpace
from elastic_lsopt.space.vector import Vector


@register("gsam")
@dataclass(frozen=True, kw_only=True)
class GSAM(Ascent):
    """Cost: two passes on every k-th step. Memory: SAM's, and one Vector within the step.

    Communication: one all-reduce of a number. Raises UserError for a value out of range.
    """

    alpha: float = 0.4
    """How much of the perpendicular part is taken away; >= 0. The paper searches 0.1 to 0.6."""

    facts: ClassVar[Facts] = Facts(
        paper="Zhuang et al. 2022, arXiv 2203.08065", passes="2 on every k-th step", memory="0; 2 within the step",
        communication="an all-reduce of a number",
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number("alpha", self.alpha)

    def gradient(self, space: ParameterSpace, oracle: Oracle, state: State) -> Vector:
        g = oracle.gradient()
        if not self.goes_up(oracle.step):
            return g
        g = g.clone()
        with self.up(space, oracle, g):
            s = oracle.gradient()
        square = space.norm(s) ** 2
        along = space.dot(g, s) / square if square else 0.0
        # s - alpha (g - along s)
        return g.mul_(-self.alpha).add_(s, alpha=1 + self.alpha * along)
