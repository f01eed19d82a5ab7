"""nBAR: SAM's effect on the balance of LoRA's two factors, without SAM's gradient.

    of each adapted layer, just before the base's step:
        if ||g_A|| >= ||g_B||:  A <- (1 + a_t lr) A,  B <- (1 - a_t lr) B
        else:                   A <- (1 - a_t lr) A,  B <- (1 + a_t lr) B

Li, Zhang, He: "Implicit Regularization of Sharpness-Aware Minimization for Scale-Invariant Problems", NeurIPS 2024,
arXiv 2410.14802, Algorithm 2. SAM moves the balance (||A||^2 - ||B||^2) / 2 by rho (||g_A||^2 - ||g_B||^2) / ||g|| per
unit of time, which gradient flow conserves; nBAR moves it the same way. Rest point: alpha = 0, which is the base.

The norms are those of the step's own gradient, before clipping. The paper lets a_t fall over the run; its first value
is a search there, and ours is a choice of this project.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from elastic_lsopt.errors import UserError
from elastic_lsopt.facts import Facts
from elastic_lsopt.optimizers.registry import register
from elastic_lsopt.optimizers.scheduled import Scheduled, require_scheduled, value_at
from elastic_lsopt.oracle.base import Base
from elastic_lsopt.oracle.clock import SampleClock
from elastic_lsopt.oracle.method import State
from elastic_lsopt.oracle.oracle import Oracle
from elastic_lsopt.space.geometry import ParameterSpace
from elastic_lsopt.space.layout import Layout
from elastic_lsopt.space.vector import Vector

A, B = ".lora_A.", ".lora_B."
"""What peft's names of the two factors of a layer differ in."""


def pairs(layout: Layout) -> list[tuple[int, int]]:
    """The numbers of (A, B) of each adapted layer."""
    number = {p.name: i for i, p in enumerate(layout.parameters)}
    return [(i, number[name.replace(A, B)]) for name, i in number.items() if A in name and name.replace(A, B) in number]


@register("nbar")
@dataclass(frozen=True, kw_only=True)
class NBAR:
    """Cost: one pass. Memory: none. Communication: one all-reduce of a number per parameter.

    Raises UserError for a value out of range, a model without adapters, or a schedule in a run whose length is not
    known.
    """

    alpha: Scheduled = field(default_factory=lambda: {"start": 0.5, "end": 0.0})
    """a_t: how fast the factors are moved apart, times the learning rate; >= 0, or a schedule that falls."""

    facts: ClassVar[Facts] = Facts(
        paper="Li et al. 2024, arXiv 2410.14802", communication="an all-reduce of a number per parameter", needs="LoRA"
    )
    parts = 1

    def __post_init__(self) -> None:
        require_scheduled("alpha", self.alpha)

    def init(self, space: ParameterSpace) -> State:
        if not pairs(space.layout):
            raise UserError(
                "nbar balances the two factors of LoRA, and no trained parameter is one (…lora_A…, …lora_B…); add a "
                "lora block, or adapters of peft's, or take another method."
            )
        return {}

    def gradient(self, space: ParameterSpace, oracle: Oracle, state: State) -> Vector:
        return oracle.gradient()

    def move(self, space: ParameterSpace, gradient: Vector, base: Base, clock: SampleClock, state: State) -> None:
        """Just before the base's step (collective)."""
        alpha, norms = value_at("alpha", self.alpha, clock), space.norm_per_parameter(gradient).values.tolist()
        grows = [0.0] * len(norms)
        for a, b in pairs(space.layout):
            grows[a], grows[b] = (1.0, -1.0) if norms[a] >= norms[b] else (-1.0, 1.0)
        for piece, w, lr in zip(space.layout.pieces, space.weights.tensors, base.rates(), strict=True):
            if grows[piece.parameter]:
                w.mul_(1 + grows[piece.parameter] * alpha * lr)
