"""m-SAM: each part of the batch steps up by its own gradient, so that a large batch sees the sharpness of small ones.

    cut the batch into parts of share p_j;  g_j = grad L_j(w),  e_j = rho g_j / ||g_j||
    w <- base step with sum_j p_j grad L_j(w + e_j)

Foret et al., ICLR 2021, arXiv 2010.01412, section 4.1, where m is the samples of a part; Andriushchenko, Flammarion:
"Towards Understanding Sharpness-Aware Minimization", ICML 2022, arXiv 2206.06232, on why a small m helps. Rest point:
parts = 1, which is SAM.

The authors of SAM take an accelerator's share of the batch as a part, which one copy of sharded weights cannot do: here
all ranks go up together, one part after the other. So the parts are the same at any world size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from elastic_lsopt.by_name import require_count
from elastic_lsopt.facts import Facts
from elastic_lsopt.optimizers.ascent import Ascent
from elastic_lsopt.optimizers.registry import register
from elastic_lsopt.oracle.method import State
from elastic_lsopt.oracle.oracle import Oracle
from elastic_lsopt.space.geometry import ParameterSpace
from elastic_lsopt.space.vector import Vector


@register("m_sam")
@dataclass(frozen=True, kw_only=True)
class MicroSAM(Ascent):
    """Cost: two passes, each in parts. Memory: SAM's, and one Vector within the step.

    Communication: the gradients are reduced twice per part. Raises UserError for a value out of range, or a batch of
    fewer micro-batches than parts.
    """

    parts: int = 4  # type: ignore[assignment]
    """Parts of the batch, each with a way up of its own; >= 1. m is the batch over it."""

    facts: ClassVar[Facts] = Facts(
        paper="Foret et al. 2021, arXiv 2010.01412", passes="2 on every k-th step", memory="0; 2 within the step",
        communication="a reduction of the gradients per part and pass", needs="a micro-batch per part",
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        require_count("parts", self.parts)

    def passes_at(self, step: int) -> int:
        return 2 * self.parts if self.goes_up(step) else 1

    def gradient(self, space: ParameterSpace, oracle: Oracle, state: State) -> Vector:
        if not self.goes_up(oracle.step):
            with oracle.accumulating() as plain:  # in the parts that there are: closures come one per part
                for part in oracle.parts(self.parts):
                    part.backward()
            return plain.gradient
        total = space.zeros()
        for part in oracle.parts(self.parts):
            g = oracle.gradient(part)
            with self.up(space, oracle, g):
                total.add_(oracle.gradient(part), alpha=oracle.shares[part.number])
        return total
