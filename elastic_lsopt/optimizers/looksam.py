"""LookSAM: SAM on each k-th step, whose sideways part serves the steps between.

    step k j:   g, s = grad L(w), grad L(w + e)         e as SAM's
                v    = s - <s, g> / ||g||^2 g           the part that flattens, which changes slowly; kept as v / ||v||
                w   <- base step with s
    else:       w   <- base step with g + alpha ||g|| v / ||v||

Liu, Mai, Chen, Hsieh, You: "Towards Efficient and Scalable Sharpness-Aware Minimization", CVPR 2022, arXiv 2203.02714,
Algorithm 1. Rest point: k = 1, which is SAM. Lengths and angles are the whole model's, not a tensor's own as in one
popular library.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from elastic_lsopt.by_name import require, require_count, require_number
from elastic_lsopt.facts import Facts
from elastic_lsopt.optimizers.ascent import Ascent
from elastic_lsopt.optimizers.registry import register
from elastic_lsopt.oracle.method import State
from elastic_lsopt.oracle.oracle import Oracle
from elastic_lsopt.space.geometry import ParameterSpace
from elastic_lsopt.space.vector import Vector


@register("looksam")
@dataclass(frozen=True, kw_only=True)
class LookSAM(Ascent):
    """Cost: two passes on each k-th step, else one. Memory: one Vector, 1/N per rank; SAM's on each k-th step.

    Communication: an all-reduce of two numbers on each k-th step. Raises UserError for a value out of range.
    """

    k: int = 5
    """Steps from one SAM step to the next; >= 1. The paper: 5."""
    alpha: float = 0.7
    """Length of the kept direction over that of the gradient; >= 0. The paper: 0.7."""

    facts: ClassVar[Facts] = Facts(
        paper="Liu et al. 2022, arXiv 2203.02714", passes="1 + 1/k", memory="1; 2 on each k-th step",
        communication="all-reduces of two numbers on each k-th step",
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        require_count("k", self.k)
        require_number("alpha", self.alpha)
        require(self.every == 1, "every", self.every, "1: looksam's own interval is k")

    def init(self, space: ParameterSpace) -> State:
        return {**super().init(space), "direction": space.zeros()}

    def goes_up(self, step: int) -> bool:
        return step % self.k == 0

    def gradient(self, space: ParameterSpace, oracle: Oracle, state: dict[str, Any]) -> Vector:
        v: Vector = state["direction"]
        g = oracle.gradient()
        if not self.goes_up(oracle.step):
            return g.add_(v, alpha=self.alpha * space.norm(g))
        square = space.norm(g) ** 2
        v.copy_(g)
        try:
            with self.up(space, oracle, v):
                s = oracle.gradient()
        except BaseException:
            v.mul_(0.0)  # the raw gradient is no direction to go on with: none is, up to the next k-th step
            raise
        along = space.dot(s, v) / square if square else 0.0
        v.mul_(-along).add_(s)
        length = space.norm(v)
        v.mul_(1 / length if length > 0 else 0.0)
        return s
