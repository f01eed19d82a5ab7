"""Functional SAM: SAM without the part of sharpness that lies in the loss by the logits.

    u  = dL / dF at w,  g = J(w)' u               F the logits, J their Jacobian by the weights
    e  = rho g / ||g||
    w <- base step with J(w + e)' u               SAM: J(w + e)' u(w + e)

Singh, Mobahi, Agarwala, Dauphin: "Avoiding spurious sharpness minimization broadens applicability of SAM", ICML 2025,
arXiv 2502.02407. To first order SAM adds (GGN + the functional part) g, and this the functional part alone: in language
models SAM is dominated by the GGN, and is worse than AdamW. Rest point: rho = 0. With logits that are linear in w it is
the base for every rho, with a loss that is linear in the logits it is SAM.

What the logits are is what `lso.Loss.forward` returns; masks, shifts and means are inside u, once. The loss of the
second pass is not known, so its place in reports holds sum(u F).
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


@register("functional_sam")
@dataclass(frozen=True, kw_only=True)
class FunctionalSAM(Ascent):
    """Cost: two passes on every k-th step. Memory: SAM's, and the logits of this rank's micro-batches within the step.

    Communication: SAM's. Raises UserError for a value out of range, or a loss that is not an lso.Loss.
    """

    needs_logits: ClassVar[bool] = True
    facts: ClassVar[Facts] = Facts(
        paper="Singh et al. 2025, arXiv 2502.02407", passes="2 on every k-th step",
        memory="0; 1 while perturbed, and the logits of a rank's share of the batch", needs="lso.Loss",
    )  # fmt: skip

    def gradient(self, space: ParameterSpace, oracle: Oracle, state: State) -> Vector:
        if not self.goes_up(oracle.step):
            return oracle.gradient()
        g, by_outputs = oracle.gradient_and_pull()
        with self.up(space, oracle, g):
            return oracle.pullback(by_outputs)
