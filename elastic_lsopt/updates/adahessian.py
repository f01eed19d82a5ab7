"""AdaHessian: Adam with the diagonal of the Hessian in place of the gradient's square.

    D = mean over a block of |z * H z|          z = 1 or -1; H of the step's batch at w
    m = b1 m + (1 - b1) g                       v = b2 v + (1 - b2) D^2
    w = w - lr (m / (1 - b1^t) / ((v / (1 - b2^s))^(k / 2) + eps) + wd w)          s: how often D was seen

Yao, Gholami, Shen, Mustafa, Keutzer, Mahoney: "ADAHESSIAN: An Adaptive Second Order Optimizer for Machine Learning",
AAAI 2021, arXiv 2006.00719, Algorithm 1. Rest point: power = 0, eps = 0 is SGD with a corrected mean as momentum.

Differs from the authors' code in: 1. z and D are those of the global batch on any number of ranks (theirs throws the
reduced D away); 2. `every` > 1 keeps v between looks, s counts them, and 1 is theirs. A block is theirs for
convolutions, a kernel; of matrices and vectors it is one element.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar, Literal

from elastic_lsopt.by_name import require, require_betas, require_count, require_number
from elastic_lsopt.facts import Facts
from elastic_lsopt.oracle.method import State
from elastic_lsopt.oracle.observation import Seen, Sees
from elastic_lsopt.space.geometry import ParameterSpace
from elastic_lsopt.space.layout import Parameter
from elastic_lsopt.space.vector import Vector
from elastic_lsopt.updates.registry import register
from elastic_lsopt.updates.update import Rates, Update, count_steps, numbers


@register("adahessian")
@dataclass(frozen=True, kw_only=True)
class AdaHessian(Update):
    """Cost: a product with the Hessian, 3 gradients, on every k-th step. Memory: two Vectors, 1/N per rank, and the
    product's own while it is made (`oracle/curvature/products.py`).

    Communication: the product's, and one all-reduce of a number a block longer than one element. Raises UserError for a
    value out of range.
    """

    first_moment: ClassVar[str] = "m"
    facts: ClassVar[Facts] = Facts(
        paper="Yao, Gholami, Shen, Mustafa, Keutzer, Mahoney 2021, arXiv 2006.00719",
        passes="1, and a product with the Hessian (3)",
        memory="2",
        communication="one all-reduce of a number a block",
        needs="a loss, not a closure",
    )
    decoupled_weight_decay: ClassVar[bool] = True
    sees: ClassVar[Sees] = "hessian_diagonal"

    betas: tuple[float, float] = (0.9, 0.999)
    """b1 of the gradient and b2 of the diagonal's square; each >= 0 and < 1. The paper: 0.9, 0.999."""
    eps: float = 1e-4
    """Beside the root of v; >= 0. The authors' code: 1e-4."""
    power: float = 1.0
    """k, the power of the diagonal; within 0 and 1. The paper: 1."""
    every: int = 1
    """Steps from one look to the next; >= 1. The paper: 1."""
    average: Literal["kernel", "row", "none"] = "kernel"
    """The block: a kernel of a convolution (what has more than two dimensions), a row of any weight, or an element."""

    def __post_init__(self) -> None:
        require_betas(self.betas)
        require_number("eps", self.eps)
        require(isinstance(self.power, int | float) and 0 <= self.power <= 1, "power", self.power, "within 0 and 1")
        require_count("every", self.every)
        require(self.average in ("kernel", "row", "none"), "average", self.average, "kernel, row or none")

    def init(self, space: ParameterSpace) -> State:
        return {"m": space.zeros(), "v": space.zeros()}

    def sees_at(self, step: int) -> bool:
        return step % self.every == 0

    def _block(self, parameter: Parameter) -> int:
        """The length of the parameter's blocks."""
        if self.average == "row" and len(parameter.shape) > 1:
            return parameter.row_length
        return prod(parameter.shape[2:]) if self.average == "kernel" else 1

    def observe(self, space: ParameterSpace, seen: Seen, state: dict[str, Any]) -> None:
        lengths = [self._block(p) for p in space.layout.parameters]
        d, b2 = space.mean_over_blocks_(seen.vector.abs_(), lengths), self.betas[1]
        state["v"].mul_(b2).addcmul_(d, d, 1 - b2)

    def update(self, space: ParameterSpace, gradient: Vector, state: dict[str, Any], rates: Rates) -> None:
        (b1, b2), w, steps = self.betas, space.weights, count_steps(space, state)
        m = state["m"].lerp_(gradient, 1 - b1)
        seen = numbers(space, state, "seen", 0)
        below = state["v"].clone().mul_each_([1 / (1 - b2**s) for s in seen]).pow_(self.power / 2).add_(self.eps)
        step = gradient.copy_(m).div_(below)
        w.mul_each_([1 - lr * decay for lr, decay in zip(rates.lr, rates.weight_decay, strict=True)])
        w.add_each_(step, [-lr / (1 - b1**t) for lr, t in zip(rates.lr, steps, strict=True)])
