"""SASSHA: momentum over a power of the Hessian's diagonal, both of a flatter place: where SAM's last gradient is.

    at w + e, e of the method (sam), every k-th step:   D = b2 D + (1 - b2) |z * H z|          z = 1 or -1
    m = b1 m + (1 - b1) g                               g the gradient at w + e
    w = (1 - lr wd) w
    w = w - lr m / (1 - b1^t) / ((D / (1 - b2^s))^p + eps)              s: the step in which D was seen last

Shin, Lee, Oh, Baek, Lee: "SASSHA: Sharpness-aware Adaptive Second-order Optimization with Stable Hessian
Approximation", ICML 2025, arXiv 2502.18153, Algorithm 1. The ascent is the landscape method's: landscape: {method:
sam, rho: 0.2}; with method none it is the same at w. Rest point: p = 0, eps = 0 is SGD with a corrected mean as
momentum.

As in the authors' code s counts steps, though D moves in every k-th only. Differs from it in: 1. e is of the global
batch; 2. p is one number, where they may schedule it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from elastic_lsopt.by_name import require, require_betas, require_count, require_number
from elastic_lsopt.facts import Facts
from elastic_lsopt.oracle.method import State
from elastic_lsopt.oracle.observation import Seen, Sees, Where
from elastic_lsopt.space.geometry import ParameterSpace
from elastic_lsopt.space.vector import Vector
from elastic_lsopt.updates.registry import register
from elastic_lsopt.updates.update import Rates, Update, count_steps, keep_numbers, numbers


@register("sassha")
@dataclass(frozen=True, kw_only=True)
class SASSHA(Update):
    """Cost: a product with the Hessian, 3 gradients, on every k-th step, beside the method's passes. Memory: two
    Vectors, 1/N per rank, and the product's own while it is made (`oracle/curvature/products.py`).

    Communication: the product's. Raises UserError for a value out of range.
    """

    first_moment: ClassVar[str] = "m"
    facts: ClassVar[Facts] = Facts(
        paper="Shin, Lee, Oh, Baek, Lee 2025, arXiv 2502.18153",
        passes="those of sam, and a product with the Hessian (3) every k",
        memory="2",
        needs="a loss, not a closure; landscape: sam",
    )
    decoupled_weight_decay: ClassVar[bool] = True
    sees: ClassVar[Sees] = "hessian_diagonal"
    where: ClassVar[Where] = "last_pass"

    betas: tuple[float, float] = (0.9, 0.999)
    """b1 of the gradient and b2 of the diagonal; each >= 0 and < 1. The authors: 0.9, 0.999; 0.965, 0.99 for GPT-2."""
    eps: float = 1e-4
    """Beside the power of D; >= 0. The authors: 1e-4."""
    power: float = 0.5
    """p, the power of D; within 0 and 1. The authors: 0.5; 0.8 for GPT-2."""
    every: int = 10
    """k, the steps from one look to the next; >= 1. The authors: 10."""

    def __post_init__(self) -> None:
        require_betas(self.betas)
        require_number("eps", self.eps)
        require(isinstance(self.power, int | float) and 0 <= self.power <= 1, "power", self.power, "within 0 and 1")
        require_count("every", self.every)

    def init(self, space: ParameterSpace) -> State:
        return {"m": space.zeros(), "d": space.zeros()}

    def sees_at(self, step: int) -> bool:
        return step % self.every == 0

    def observe(self, space: ParameterSpace, seen: Seen, state: dict[str, Any]) -> None:
        state["d"].lerp_(seen.vector.abs_(), 1 - self.betas[1])
        keep_numbers(space, state, "seen_at", [t + 1 for t in numbers(space, state, "step", 0)])

    def update(self, space: ParameterSpace, gradient: Vector, state: dict[str, Any], rates: Rates) -> None:
        (b1, b2), w, steps = self.betas, space.weights, count_steps(space, state)
        m = state["m"].lerp_(gradient, 1 - b1)
        seen = numbers(space, state, "seen_at", 0)
        below = state["d"].clone().mul_each_([1 / (1 - b2**s) for s in seen]).pow_(self.power).add_(self.eps)
        step = gradient.copy_(m).div_(below)
        w.mul_each_([1 - lr * decay for lr, decay in zip(rates.lr, rates.weight_decay, strict=True)])
        w.add_each_(step, [-lr / (1 - b1**t) for lr, t in zip(rates.lr, steps, strict=True)])
