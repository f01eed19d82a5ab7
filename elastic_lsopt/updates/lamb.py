"""LAMB: Adam's step of each parameter, as long as the parameter is.

    m = b1 m + (1 - b1) g             v = b2 v + (1 - b2) g^2
    r = (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps) + wd w
    w = w - lr phi(||w||) / ||r|| r   phi(z) = min(z, most); the ratio is 1 where a norm is 0, and for vectors if asked

You, Li, Reddi, Hseu, Kumar, Bhojanapalli, Song, Demmel, Keutzer, Hsieh: "Large Batch Optimization for Deep Learning:
Training BERT in 76 minutes", ICLR 2020, arXiv 1904.00962, Algorithm 2. The BERT recipe leaves biases and the gains of
norms out of the ratio: `vectors=False`. Rest point: that, of parameters that are all vectors, where it is AdamW.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from elastic_lsopt.by_name import require, require_betas, require_number
from elastic_lsopt.facts import Facts
from elastic_lsopt.oracle.method import State
from elastic_lsopt.space.geometry import ParameterSpace
from elastic_lsopt.space.vector import Scales, Vector
from elastic_lsopt.updates.registry import register
from elastic_lsopt.updates.update import Rates, Update, count_steps


@register("lamb")
@dataclass(frozen=True, kw_only=True)
class LAMB(Update):
    """Memory: two Vectors, 1/N per rank. Communication: one all-reduce per step of two numbers per parameter.

    Raises UserError for a value out of range.
    """

    first_moment: ClassVar[str] = "m"
    second_moment: ClassVar[str] = "v"
    facts: ClassVar[Facts] = Facts(
        paper="You et al. 2019, arXiv 1904.00962",
        memory="2",
        communication="one all-reduce of two numbers per parameter and step",
    )

    betas: tuple[float, float] = (0.9, 0.999)
    """b1 and b2; each >= 0 and < 1."""
    eps: float = 1e-6
    """Beside the root of the second moment; >= 0."""
    most: float = 10.0
    """Largest length that phi gives; >= 0 (inf: the length itself)."""
    vectors: bool = True
    """Whether parameters of one dimension have a ratio too."""

    def __post_init__(self) -> None:
        require_betas(self.betas)
        require_number("eps", self.eps)
        require(isinstance(self.most, int | float) and self.most >= 0, "most", self.most, "a number >= 0 or inf")

    def init(self, space: ParameterSpace) -> State:
        return {"m": space.zeros(), "v": space.zeros()}

    def update(self, space: ParameterSpace, gradient: Vector, state: dict[str, Any], rates: Rates) -> None:
        m, v, w = state["m"], state["v"], space.weights
        (b1, b2), steps = self.betas, count_steps(space, state)
        m.lerp_(gradient, 1 - b1)
        v.mul_(b2).addcmul_(gradient, gradient, 1 - b2)
        root = gradient.copy_(v).mul_each_([1 / (1 - b2**t) for t in steps]).sqrt_().add_(self.eps)
        r = m.clone().mul_each_([1 / (1 - b1**t) for t in steps]).div_(root).add_each_(w, rates.weight_decay)
        of_w, of_r = (norms.values for norms in space.norms_per_parameter(w, r))
        adapted = torch.tensor([self.vectors or len(p.shape) > 1 for p in space.layout.parameters], device=of_w.device)
        trusted = adapted & (of_w > 0) & (of_r > 0)
        ratio = torch.where(trusted, of_w.clamp(max=self.most) / of_r, torch.ones_like(of_w))
        lr = torch.tensor(rates.lr, dtype=torch.float64, device=of_w.device)
        w.add_(r.mul_(Scales(lr * ratio, "parameter")), alpha=-1.0)
