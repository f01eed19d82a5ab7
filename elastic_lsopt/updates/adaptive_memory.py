"""Adaptive memory: momentum whose coefficient is chosen anew in each step, from two planes below the loss.

    d      what is remembered, the first gradient at first;  g the gradient, weight decay in it (sgd)
    sgd    beta = clip((||g||^2 + 2 lam <g, d> - lam ||d||^2) / ||d - g||^2, 0, most)      one number for all parameters
           d    = ((beta + lam) d + (1 - beta) g) / (1 + lam)
           w    = w - lr d
    adamw  v    = b2 v + (1 - b2) g^2
           P    = (1 - b1 prod_{i<t} beta_i) (sqrt(v / (1 - b2^t)) + eps)     b1 = most - 0.1 lam
           D    = 1 / (P (1 + lam P))                                         <a, b>_D = sum D a b
           gap  = lr_{t-1} <g, d / P + wd w>
           beta = clip(((1 + wd lr) gap / lr - <d - g, g + lam P d>_D - wd <w, d - g>) / ||d - g||_D^2, 0, b1)
           d    = ((1 - beta) g + (lam P + beta) d) / (1 + lam P)
           w    = (1 - wd lr) w - lr d / P                                    beta = b1 and d = 0 in the first step

"Adaptive Memory Momentum via a Model-Based Framework for Deep Learning Optimization", 2025, arXiv 2510.04988: near w
the loss is taken to lie above two planes, that of g and that of d, and beta maximises the dual of the step on their
maximum. Rest point: sgd with lam = 0 and most = 0 is SGD.

The adamw form has a beta for each parameter. Differs from the authors' code, which was not to be had, in nothing that
is known: the recurrences are those of the paper's readers, and the dual was checked on a grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from elastic_lsopt.by_name import require, require_number, require_share
from elastic_lsopt.facts import Facts
from elastic_lsopt.oracle.method import State
from elastic_lsopt.space.geometry import ParameterSpace
from elastic_lsopt.space.vector import Vector
from elastic_lsopt.updates.registry import register
from elastic_lsopt.updates.update import Rates, Update, count_steps, keep_numbers, numbers


@register("adaptive_memory")
@dataclass(frozen=True, kw_only=True)
class AdaptiveMemory(Update):
    """Memory: one Vector (sgd) or two (adamw), 1/N per rank, and six more during a step of adamw.

    Communication: one all-reduce per step of three (sgd) or five (adamw) numbers per parameter. Raises UserError for a
    value out of range.
    """

    first_moment: ClassVar[str] = "d"
    facts: ClassVar[Facts] = Facts(
        paper="2025, arXiv 2510.04988", memory="1 (sgd), 2 (adamw)", communication="one all-reduce per step"
    )

    form: Literal["adamw", "sgd"] = "adamw"
    """What the memory is of: AdamW's first moment, or SGD's momentum."""
    lam: float = 0.1
    """lam, the weight of what is remembered beside the step's own length; >= 0. The paper: 0.1."""
    most: float = 0.9
    """Largest beta, >= 0 and < 1; the adamw form takes 0.1 lam off. The paper: 0.9."""
    beta2: float = 0.999
    """b2 of the second moment; >= 0 and < 1. For adamw only."""
    eps: float = 1e-8
    """Beside the root of the second moment; >= 0. For adamw only."""

    def __post_init__(self) -> None:
        require(self.form in ("adamw", "sgd"), "form", self.form, "adamw or sgd")
        require_number("lam", self.lam)
        require_share("most", self.most)
        require(self.most >= 0.1 * self.lam or self.form == "sgd", "most", self.most, f">= 0.1 lam, lam={self.lam}")
        require_share("beta2", self.beta2)
        require_number("eps", self.eps)

    @property
    def decoupled_weight_decay(self) -> bool:  # type: ignore[override]
        return self.form == "adamw"

    def init(self, space: ParameterSpace) -> State:
        return {"d": space.zeros(), **({"v": space.zeros()} if self.form == "adamw" else {})}

    def update(self, space: ParameterSpace, gradient: Vector, state: dict[str, Any], rates: Rates) -> None:
        if self.form == "sgd":
            self._sgd(space, gradient.add_each_(space.weights, rates.weight_decay), state, rates)
        else:
            self._adamw(space, gradient, state, rates)

    def _sgd(self, space: ParameterSpace, g: Vector, state: dict[str, Any], rates: Rates) -> None:
        d, lam = state["d"], self.lam
        d.lerp_each_(
            g, [float(t == 1) for t in count_steps(space, state)]
        )  # d is a parameter's first gradient at first
        gg, gd, dd = space.dots_per_parameter((g, g), (g, d), (d, d)).sum(1).tolist()
        beta = _clipped(gg + 2 * lam * gd - lam * dd, gg - 2 * gd + dd, self.most)
        d.lerp_(g, (1 - beta) / (1 + lam))
        space.weights.add_each_(d, [-lr for lr in rates.lr])

    def _adamw(self, space: ParameterSpace, g: Vector, state: dict[str, Any], rates: Rates) -> None:
        d, v, w, largest = state["d"], state["v"], space.weights, self.most - 0.1 * self.lam
        steps, products = count_steps(space, state), numbers(space, state, "product", 1.0)
        v.mul_(self.beta2).addcmul_(g, g, 1 - self.beta2)
        p = v.clone().mul_each_([1 / (1 - self.beta2**t) for t in steps]).sqrt_().add_(self.eps)
        p.mul_each_([1 - largest * product for product in products])
        past = (p * self.lam).mul_(d).add_(g)
        apart = d - g
        weighed = apart.clone().div_((p * self.lam).add_(1.0)).div_(p)
        pairs = (g, d.clone().div_(p)), (g, w), (weighed, past), (w, apart), (weighed, apart)
        before = numbers(space, state, "lr", 0.0)
        betas = self._betas(steps, before, rates, space.dots_per_parameter(*pairs).tolist())
        d.add_each_(weighed.mul_(p), [beta - 1 for beta in betas])  # by (1 - beta) / (1 + lam P) of the way to g
        keep_numbers(space, state, "product", [a * b for a, b in zip(products, betas, strict=True)])
        keep_numbers(space, state, "lr", rates.lr)
        w.mul_each_([1 - lr * decay for lr, decay in zip(rates.lr, rates.weight_decay, strict=True)])
        w.add_each_(weighed.copy_(d).div_(p), [-lr for lr in rates.lr])

    def _betas(
        self, steps: Sequence[int], before: Sequence[float], rates: Rates, dots: Sequence[Sequence[float]]
    ) -> list[float]:
        largest, out = self.most - 0.1 * self.lam, []
        for t, lr_before, lr, decay, gd, gw, past, w_apart, apart in zip(
            steps, before, rates.lr, rates.weight_decay, *dots, strict=True
        ):
            gap = (1 + decay * lr) * lr_before / lr * (gd + decay * gw) if lr else 0.0
            out.append(largest if t == 1 else _clipped(gap - past - decay * w_apart, apart, largest))
        return out


def _clipped(above: float, below: float, most: float) -> float:
    """above / below within 0 and most; 0 where what is remembered is the gradient itself, and any share does."""
    return min(max(above / below, 0.0), most) if below > 0 else 0.0
