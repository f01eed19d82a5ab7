"""LARS: each matrix steps by its own length.

    ratio = c ||w|| / (||g|| + wd ||w||)          of each parameter; 1 for vectors, and where a norm is 0
    v     = m v + lr ratio (g + wd w)
    w     = w - v

You, Gitman, Ginsburg: "Large Batch Training of Convolutional Networks", 2017, arXiv 1708.03888, Algorithm 1. Rest
point: parameters that are all vectors, where it is SGD with the rate inside the momentum.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from elastic_lsopt.by_name import require_number, require_share
from elastic_lsopt.facts import Facts
from elastic_lsopt.oracle.method import State
from elastic_lsopt.space.geometry import ParameterSpace
from elastic_lsopt.space.vector import Scales, Vector
from elastic_lsopt.updates.registry import register
from elastic_lsopt.updates.update import Rates, Update


@register("lars")
@dataclass(frozen=True, kw_only=True)
class LARS(Update):
    """Memory: one Vector, 1/N per rank. Communication: one all-reduce per step of two numbers per parameter.

    Raises UserError for a value out of range.
    """

    first_moment: ClassVar[str] = "momentum"
    facts: ClassVar[Facts] = Facts(
        paper="You et al. 2017, arXiv 1708.03888",
        memory="1",
        communication="one all-reduce of two numbers per parameter and step",
    )

    momentum: float = 0.9
    """m; >= 0 and < 1."""
    trust: float = 0.001
    """c, the trust coefficient; >= 0."""

    def __post_init__(self) -> None:
        require_share("momentum", self.momentum)
        require_number("trust", self.trust)

    def init(self, space: ParameterSpace) -> State:
        return {"momentum": space.zeros()}

    def update(self, space: ParameterSpace, gradient: Vector, state: dict[str, Any], rates: Rates) -> None:
        v, w = state["momentum"], space.weights
        of_w, of_g = (norms.values for norms in space.norms_per_parameter(w, gradient))
        decay = torch.tensor(rates.weight_decay, dtype=torch.float64, device=of_w.device)
        lr = torch.tensor(rates.lr, dtype=torch.float64, device=of_w.device)
        matrix = torch.tensor([len(p.shape) > 1 for p in space.layout.parameters], device=of_w.device)
        trusted = matrix & (of_w > 0) & (of_g > 0)
        ratio = torch.where(trusted, self.trust * of_w / (of_g + decay * of_w), torch.ones_like(of_w))
        gradient.add_each_(w, rates.weight_decay).mul_(Scales(lr * ratio, "parameter"))
        v.mul_(self.momentum).add_(gradient)
        w.add_(v, alpha=-1.0)
