"""Sharpness-Aware Minimization: step with the gradient at the worst point of a small ball.

    g  = grad L(w)
    e  = rho g / (||g|| + 1e-12)          ||.|| over the whole model, a parameter, or a row
    w <- base step with grad L(w + e)

Foret, Kleiner, Mobahi, Neyshabur: "Sharpness-Aware Minimization for Efficiently Improving Generalization", ICLR 2021,
arXiv 2010.01412, Algorithm 1 (p = 2). Rest point: rho = 0.

Differs from the authors' code in: 1. the ascent gradient is that of the global batch, not each accelerator's own (one
copy of sharded weights cannot stand at several points; the paper's m equals the batch); 2. weight decay stays with the
base optimizer. `every: k` is MosaicML Composer's interval; `rho_scale: sqrt_n` keeps the length per weight, so that a
bf16 forward still sees the perturbation of a very large model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from elastic_lsopt.by_name import require, require_count, require_number
from elastic_lsopt.facts import Facts
from elastic_lsopt.optimizers.registry import register
from elastic_lsopt.oracle.method import State
from elastic_lsopt.oracle.oracle import Oracle
from elastic_lsopt.space.geometry import ParameterSpace
from elastic_lsopt.space.vector import Scales, Vector

TINY = 1e-12
REFERENCE_PARAMETERS = 1e7
"""Size of model at which `rho_scale: sqrt_n` leaves rho as it is."""


@register("sam")
@dataclass(frozen=True, kw_only=True)
class SAM:
    """Cost: two passes on every k-th step, else one. Memory: one shard while perturbed (none on ZeRO-1/2, bf16 ZeRO-3).

    Communication: none beyond the passes' own (one small all-reduce more for a radius per parameter or row).
    Raises UserError for a value out of range.
    """

    facts: ClassVar[Facts] = Facts(
        paper="Foret et al. 2020, arXiv 2010.01412",
        passes="1 + 1/every",
        memory="0; while perturbed 1 (none on ZeRO-1/2 and bf16 ZeRO-3)",
        communication="none; per step one all-reduce of a number per parameter or row for such a radius",
    )

    rho: float = 0.05
    """L2 radius, in units of the weights; >= 0."""
    every: int = 1
    """Displace on each k-th step only; >= 1."""
    radius: Literal["model", "parameter", "row"] = "model"
    """What has length rho: the whole perturbation, that of each parameter, or that of each row."""
    rho_scale: Literal["none", "sqrt_n"] = "none"
    """sqrt_n: rho counts for a model of 1e7 parameters and grows with the square root of the number."""

    parts = 1

    def __post_init__(self) -> None:
        require_number("rho", self.rho)
        require_count("every", self.every)
        require(self.radius in ("model", "parameter", "row"), "radius", self.radius, "model, parameter or row")
        require(self.rho_scale in ("none", "sqrt_n"), "rho_scale", self.rho_scale, "none or sqrt_n")

    def init(self, space: ParameterSpace) -> State:
        return {}

    def gradient(self, space: ParameterSpace, oracle: Oracle, state: State) -> Vector:
        g = oracle.gradient()
        if oracle.step % self.every:
            return g
        with space.perturbed(g, self._length(space) / (self._norm(space, g) + TINY)):
            return oracle.gradient()

    def _length(self, space: ParameterSpace) -> float:
        return self.rho * (math.sqrt(space.layout.numel / REFERENCE_PARAMETERS) if self.rho_scale == "sqrt_n" else 1.0)

    def _norm(self, space: ParameterSpace, g: Vector) -> float | Scales:
        match self.radius:
            case "model":
                return space.norm(g)
            case "parameter":
                return space.norm_per_parameter(g)
            case _:
                return space.norm_per_row(g)
