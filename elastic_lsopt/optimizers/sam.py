"""Sharpness-Aware Minimization: step with the gradient at the worst point of a small ball.

    g  = grad L(w)
    e  = rho g / (||g|| + 1e-12)          ||.|| over the whole model, a parameter, or a row
    w <- base step with grad L(w + e)

Foret, Kleiner, Mobahi, Neyshabur: "Sharpness-Aware Minimization for Efficiently Improving Generalization", ICLR 2021,
arXiv 2010.01412, Algorithm 1 (p = 2). Rest point: rho = 0.

Differs from the authors' code in: 1. the ascent gradient is that of the global batch, not each accelerator's own (one
copy of sharded weights cannot stand at several points; the paper's m equals the batch, and `m_sam` has smaller ones);
2. weight decay stays with the base optimizer. What else `ascent.py` offers is written there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from elastic_lsopt.facts import Facts
from elastic_lsopt.optimizers.ascent import Ascent
from elastic_lsopt.optimizers.registry import register
from elastic_lsopt.oracle.method import State
from elastic_lsopt.oracle.oracle import Oracle
from elastic_lsopt.space.geometry import ParameterSpace
from elastic_lsopt.space.vector import Vector


@register("sam")
@dataclass(frozen=True, kw_only=True)
class SAM(Ascent):
    """Cost: two passes on every k-th step, else one. Memory: one shard while perturbed (none on ZeRO-1/2, bf16 ZeRO-3).

    Communication: none beyond the passes' own (one small all-reduce more for a radius per parameter or row).
    Raises UserError for a value out of range.
    """

    facts: ClassVar[Facts] = Facts(
        paper="Foret et al. 2021, arXiv 2010.01412", passes="2 on every k-th step", memory="0; 1 while perturbed"
    )

    def gradient(self, space: ParameterSpace, oracle: Oracle, state: State) -> Vector:
        g = oracle.gradient()
        if not self.goes_up(oracle.step):
            return g
        with self.up(space, oracle, g):
            return oracle.gradient()
