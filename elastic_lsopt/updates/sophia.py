"""Sophia: momentum over a diagonal of the curvature that is looked at now and then, no element further than lr.

    m = b1 m + (1 - b1) g
    every k-th step, of the step's batch at w:
        sophia_g   g^ = the mean gradient for labels drawn from the model,  h = b2 h + (1 - b2) B g^^2
        sophia_h   z = 1 or -1,                                             h = b2 h + (1 - b2) z H z
    w = (1 - lr wd) w
    w = w - lr clip(m / (rho h + 1e-15))                 sophia_g      clip(x): within -1 and 1
    w = w - lr clip(m / max(gamma h, eps))               sophia_h

Liu, Li, Hall, Liang, Ma: "Sophia: A Scalable Stochastic Second-order Optimizer for Language Model Pre-training", ICLR
2024, arXiv 2305.14342, Algorithm 3. B is the batch's number of terms (tokens), because g^ is their mean: B g^^2 is an
unbiased diagonal of the Gauss-Newton matrix. Rest point: rho = 0 and gamma = 0 are momentum's sign (with h = 0, too).

Differs from the authors' code in: 1. it looks before the first step of k and not after the last, as the paper does, so
that no phase of sign momentum comes first; 2. B is inside h, as in the paper, and not beside it, which is the same for
batches of one size and right for others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from elastic_lsopt.by_name import require_betas, require_count, require_number
from elastic_lsopt.facts import Facts
from elastic_lsopt.oracle.method import State
from elastic_lsopt.oracle.observation import Seen, Sees
from elastic_lsopt.space.geometry import ParameterSpace
from elastic_lsopt.space.vector import Vector
from elastic_lsopt.updates.registry import register
from elastic_lsopt.updates.update import Rates, Update

TINY = 1e-15
PAPER = "Liu, Li, Hall, Liang, Ma 2024, arXiv 2305.14342"


@dataclass(frozen=True, kw_only=True)
class Sophia(Update):
    """What both forms have."""

    decoupled_weight_decay: ClassVar[bool] = True

    betas: tuple[float, float] = (0.965, 0.99)
    """b1 of the gradient and b2 of the curvature; each >= 0 and < 1. The paper: 0.965 (0.96), 0.99."""
    every: int = 10
    """k, the steps from one look to the next; >= 1. The paper: 10."""

    def __post_init__(self) -> None:
        require_betas(self.betas)
        require_count("every", self.every)

    def init(self, space: ParameterSpace) -> State:
        return {"m": space.zeros(), "h": space.zeros()}

    def sees_at(self, step: int) -> bool:
        return step % self.every == 0

    def _step(self, space: ParameterSpace, step: Vector, rates: Rates) -> None:
        """w = (1 - lr wd) w - lr clip(step)."""
        w = space.weights
        w.mul_each_([1 - lr * decay for lr, decay in zip(rates.lr, rates.weight_decay, strict=True)])
        w.add_each_(step.clamp_(-1.0, 1.0), [-lr for lr in rates.lr])


@register("sophia_g")
@dataclass(frozen=True, kw_only=True)
class SophiaG(Sophia):
    """Sophia-G: momentum over the diagonal of the Gauss-Newton matrix, seen by labels that the model draws itself.

    Cost: one more gradient on every k-th step. Memory: two Vectors, 1/N per rank. Communication: that gradient's.
    Needs an lso.Loss with `sample` (those of causal LMs and classifiers have it). Raises UserError for a value out of
    range.
    """

    first_moment: ClassVar[str] = "m"
    facts: ClassVar[Facts] = Facts(paper=PAPER, passes="1 + 1/k", memory="2", needs="lso.Loss with sample")
    sees: ClassVar[Sees] = "sampled_gradient"

    rho: float = 0.04
    """What of the curvature stands below the step; >= 0. The authors: 0.05 (125M), 0.08 (355M), 0.05 (770M); such that
    a tenth to a half of the elements are not clipped."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number("rho", self.rho)

    def observe(self, space: ParameterSpace, seen: Seen, state: dict[str, Any]) -> None:
        b2 = self.betas[1]
        state["h"].mul_(b2).addcmul_(seen.vector, seen.vector, (1 - b2) * seen.weight)

    def update(self, space: ParameterSpace, gradient: Vector, state: dict[str, Any], rates: Rates) -> None:
        m = state["m"].lerp_(gradient, 1 - self.betas[0])
        below = (state["h"] * self.rho).add_(TINY)
        self._step(space, gradient.copy_(m).div_(below), rates)


@register("sophia_h")
@dataclass(frozen=True, kw_only=True)
class SophiaH(Sophia):
    """Sophia-H: momentum over the diagonal of the Hessian, seen by a product with random signs.

    Cost: a product with the Hessian, 3 gradients, on every k-th step. Memory: two Vectors, 1/N per rank, and the
    product's own while it is made (`oracle/curvature/products.py`). Communication: the product's.
    Raises UserError for a value out of range.
    """

    first_moment: ClassVar[str] = "m"
    facts: ClassVar[Facts] = Facts(
        paper=PAPER, passes="1, and a product with the Hessian (3) every k", memory="2", needs="a loss, not a closure"
    )
    sees: ClassVar[Sees] = "hessian_diagonal"

    gamma: float = 0.01
    """What of the curvature stands below the step; >= 0. The paper: 0.01."""
    eps: float = 1e-12
    """Least that stands below it; > 0. The paper: 1e-12."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number("gamma", self.gamma)
        require_number("eps", self.eps, positive=True)

    def observe(self, space: ParameterSpace, seen: Seen, state: dict[str, Any]) -> None:
        state["h"].lerp_(seen.vector, 1 - self.betas[1])

    def update(self, space: ParameterSpace, gradient: Vector, state: dict[str, Any], rates: Rates) -> None:
        m = state["m"].lerp_(gradient, 1 - self.betas[0])
        below = (state["h"] * self.gamma).clamp_(self.eps, float("inf"))
        self._step(space, gradient.copy_(m).div_(below), rates)
