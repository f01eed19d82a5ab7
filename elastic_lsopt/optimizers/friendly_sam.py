"""Friendly SAM: go up along what is the batch's own of the gradient, not along what all batches share.

    g  = grad L(w)
    d  = g - sigma m                      m the mean of past gradients; of the first step d = g
    m  = lam m + (1 - lam) g
    e  = rho d / ||d||
    w <- base step with grad L(w + e)

Li, Zhou, He, Cheng, Huang: "Friendly Sharpness-Aware Minimization", CVPR 2024, arXiv 2403.12350, Algorithm 1, as the
authors' code: the old m is subtracted, and m begins as the first gradient. Rest point: sigma = 0, which is SAM.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from elastic_lsopt.by_name import require_number, require_share
from elastic_lsopt.facts import Facts
from elastic_lsopt.optimizers.ascent import Ascent
from elastic_lsopt.optimizers.registry import register
from elastic_lsopt.oracle.method import State
from elastic_lsopt.oracle.oracle import Oracle
from elastic_lsopt.space.geometry import ParameterSpace
from elastic_lsopt.space.vector import Vector


@register("friendly_sam")
@dataclass(frozen=True, kw_only=True)
class FriendlySAM(Ascent):
    """Cost: two passes on every k-th step. Memory: one Vector, 1/N per rank; SAM's and one more while perturbed.

    Communication: one all-reduce of a number. Raises UserError for a value out of range.
    """

    sigma: float = 1.0
    """How much of the mean is taken away; >= 0. The paper: 1."""
    decay: float = 0.9
    """lam, what a step leaves of the mean; >= 0 and < 1. The paper: 0.6 to 0.95."""

    facts: ClassVar[Facts] = Facts(
        paper="Li et al. 2024, arXiv 2403.12350", passes="2 on every k-th step", memory="1; 3 while perturbed",
        communication="an all-reduce of a number",
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number("sigma", self.sigma)
        require_share("decay", self.decay)

    def init(self, space: ParameterSpace) -> State:
        return {**super().init(space), "mean": space.zeros(), "begun": 0}

    def gradient(self, space: ParameterSpace, oracle: Oracle, state: dict[str, Any]) -> Vector:
        mean: Vector = state["mean"]
        g = oracle.gradient()
        d = g.clone() if self.goes_up(oracle.step) else None
        if d is not None and state["begun"]:
            d.add_(mean, alpha=-self.sigma)
        mean.lerp_(g, 1 - self.decay) if state["begun"] else mean.copy_(g)
        state["begun"] = 1
        if d is None:
            return g
        with self.up(space, oracle, d, gradient=g):
            return oracle.gradient()
