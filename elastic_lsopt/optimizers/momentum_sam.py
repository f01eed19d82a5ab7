"""Momentum SAM: look ahead along the base's momentum, so that flatness costs no gradient of its own.

    e  = -rho v / (||v|| + 1e-12)          v the base's momentum
    w <- base step with grad L(w + e)

Becker, Altrock, Risse: "Momentum-SAM: Sharpness Aware Minimization without Computational Overhead", 2024, arXiv
2401.12033, as the authors' code: the weights move against v, where the next step leads. With AdamW v is its first
moment. Rest point: rho = 0, and the first step of a run, before there is momentum: the base's.

Differs from the authors' code in: 1. the model's own weights are w, so that evaluation, checkpoints and probes need no
way back; 2. weight decay is the base's, at w and not at w + e.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from elastic_lsopt.by_name import require
from elastic_lsopt.facts import Facts
from elastic_lsopt.optimizers.ascent import Ascent
from elastic_lsopt.optimizers.perturbed import chosen, masked
from elastic_lsopt.optimizers.registry import register
from elastic_lsopt.optimizers.scheduled import Scheduled
from elastic_lsopt.oracle.base import Need
from elastic_lsopt.oracle.method import State
from elastic_lsopt.oracle.oracle import Oracle
from elastic_lsopt.space.geometry import ParameterSpace
from elastic_lsopt.space.vector import Vector


@register("momentum_sam")
@dataclass(frozen=True, kw_only=True)
class MomentumSAM(Ascent):
    """Cost: one pass. Memory: SAM's one shard while perturbed; nothing between steps.

    Communication: one all-reduce of a number. Raises UserError for a value out of range, or a base without momentum.
    """

    rho: Scheduled = 0.3
    """L2 length of the look ahead; >= 0, or a schedule. The authors: 0.3 to 3 with SGD, 1 to 3 with AdamW."""

    facts: ClassVar[Facts] = Facts(
        paper="Becker et al. 2024, arXiv 2401.12033", passes="1", memory="0; 1 while perturbed",
        communication="an all-reduce of a number", needs="a base with momentum",
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.precondition == "none", "precondition", self.precondition, "none: the momentum is the direction")

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"momentum"})

    def passes_at(self, step: int) -> int:
        return 1

    def gradient(self, space: ParameterSpace, oracle: Oracle, state: State) -> Vector:
        assert oracle.base is not None
        if not self.goes_up(oracle.step):
            return oracle.gradient()
        v = oracle.base.momentum()
        scale = -self.rho_at(space, oracle) / (self.length(space, v) + self.tiny)
        with space.perturbed(v, masked(scale, chosen(self.perturb, space), space)):
            return oracle.gradient()
