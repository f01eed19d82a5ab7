"""WSAM: sharpness as a term of the loss with a weight of its own.

    g, s = grad L(w), grad L(w + e)                       e as SAM's; a = gamma / (1 - gamma)
    coupled:     w <- base step with (1 - a) g + a s
    decoupled:   w <- base step with g;  w <- w - lr a (s - g)

Yue, Jiang, Ye, Gao, Liu, Zhang: "Sharpness-Aware Minimization Revisited: Weighted Sharpness as a Regularization Term",
KDD 2023, arXiv 2305.15817, Algorithms 1 and 2. Rest point: coupled with gamma = 1/2, which is SAM; gamma = 0 is the
base.

The decoupled term moves the weights just before the base's step rather than after it, so that one step makes all
copies right: the same, but for the base's weight decay, which then acts on it too. It is not clipped.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from elastic_lsopt.by_name import require_share
from elastic_lsopt.facts import Facts
from elastic_lsopt.optimizers.ascent import Ascent
from elastic_lsopt.optimizers.registry import register
from elastic_lsopt.oracle.base import Base
from elastic_lsopt.oracle.clock import SampleClock
from elastic_lsopt.oracle.oracle import Oracle
from elastic_lsopt.space.geometry import ParameterSpace
from elastic_lsopt.space.vector import Vector


@register("wsam")
@dataclass(frozen=True, kw_only=True)
class WSAM(Ascent):
    """Cost: two passes on every k-th step. Memory: SAM's, and one Vector within the step.

    Communication: none. Raises UserError for a value out of range.
    """

    gamma: float = 0.9
    """Weight of the sharpness; >= 0 and < 1. The paper: 0.5 to 0.95."""
    decouple: bool = True
    """Whether the sharpness moves the weights beside the base, as AdamW's decay does; not over schedule_free."""

    facts: ClassVar[Facts] = Facts(
        paper="Yue et al. 2023, arXiv 2305.15817", passes="2 on every k-th step", memory="0; 2 within the step"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require_share("gamma", self.gamma)

    def gradient(self, space: ParameterSpace, oracle: Oracle, state: dict[str, Any]) -> Vector:
        g = oracle.gradient()
        if not self.goes_up(oracle.step):
            return g
        g = g.clone()
        with self.up(space, oracle, g):
            s = oracle.gradient()
        a = self.gamma / (1 - self.gamma)
        if not self.decouple:
            return g.mul_(1 - a).add_(s, alpha=a)
        state["_sharpness"] = (s - g).mul_(a)
        return g

    def move(
        self, space: ParameterSpace, gradient: Vector, base: Base, clock: SampleClock, state: dict[str, Any]
    ) -> None:
        """Just before the base's step: w <- w - lr a (s - g). No communication."""
        sharpness: Vector | None = state.pop("_sharpness", None)
        if sharpness is not None:
            for w, t, lr in zip(space.weights.tensors, sharpness.tensors, base.rates(), strict=True):
                w.add_(t.to(w.dtype), alpha=-lr)
