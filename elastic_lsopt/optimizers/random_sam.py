"""Random SAM: SAM's length in a direction that the gradient has no part in; what of SAM's effect is only noise?

    z ~ N(0, I);   e = rho z / ||z||
    w <- base step with grad L(w + e)

The control that SAM's own paper compares with: Foret et al., ICLR 2021, arXiv 2010.01412, appendix C.3; in bf16 most
of a perturbation is rounding, so it is the fair one there (`docs/papers.md`). Rest point: rho = 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from elastic_lsopt.by_name import require
from elastic_lsopt.facts import Facts
from elastic_lsopt.optimizers.ascent import Ascent
from elastic_lsopt.optimizers.registry import register
from elastic_lsopt.oracle.method import State
from elastic_lsopt.oracle.oracle import Oracle
from elastic_lsopt.space.geometry import ParameterSpace
from elastic_lsopt.space.vector import Vector


@register("random_sam")
@dataclass(frozen=True, kw_only=True)
class RandomSAM(Ascent):
    """Cost: one pass. Memory: SAM's; the noise is one Vector until it is added.

    Communication: an all-reduce of a number. Raises UserError for a value out of range.
    """

    facts: ClassVar[Facts] = Facts(
        paper="Foret et al. 2021, arXiv 2010.01412", passes="1", memory="0; 1 while perturbed",
        communication="an all-reduce of a number",
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        says = "none: noise has no gradient, and is longest where the base has no second moment"
        require(self.precondition == "none", "precondition", self.precondition, says)

    def passes_at(self, step: int) -> int:
        return 1

    def gradient(self, space: ParameterSpace, oracle: Oracle, state: State) -> Vector:
        if not self.goes_up(oracle.step):
            return oracle.gradient()
        with self.up(space, oracle, space.noise(oracle.step).vector()):
            return oracle.gradient()
