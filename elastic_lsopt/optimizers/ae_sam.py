"""AE-SAM: SAM's second gradient only where the landscape looks sharp, by the gradient's length among past ones.

    n = ||grad L(w)||^2;   mu = d mu + (1 - d) n;   s2 = d s2 + (1 - d) (n - mu)^2
    SAM's step where n >= mu + c sqrt(s2), else the base's;   c = (t / T) lambda1 + (1 - t / T) lambda2

Jiang, Yang, Zhang, Kwok: "An Adaptive Policy to Employ Sharpness-Aware Minimization", ICLR 2023, arXiv 2304.14647,
Algorithm 1. Rest point: lambda1 = lambda2 = -1e9, which is SAM; +1e9 is the base.

mu begins at 0 and s2 at e^-10. All ranks decide alike, from the reduced length. t / T runs on committed samples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from elastic_lsopt.by_name import require, require_share
from elastic_lsopt.facts import Facts
from elastic_lsopt.optimizers.ascent import Ascent
from elastic_lsopt.optimizers.registry import register
from elastic_lsopt.optimizers.scheduled import Scheduled, value_at
from elastic_lsopt.oracle.method import State
from elastic_lsopt.oracle.oracle import Oracle
from elastic_lsopt.space.geometry import ParameterSpace
from elastic_lsopt.space.vector import Vector

C = "c (from lambda2 to lambda1)"


@register("ae_sam")
@dataclass(frozen=True, kw_only=True)
class AESAM(Ascent):
    """Cost: one pass, or two where SAM's step is taken (about half of the steps). Memory: SAM's; two numbers between.

    Communication: none. Raises UserError for a value out of range, or where the length of the run is not known.
    """

    decay: float = 0.9
    """d, what a step leaves of mean and variance; >= 0 and < 1. The paper: 0.9."""
    lambda1: float = -1.0
    """c at the end of the run. The paper: -1."""
    lambda2: float = 1.0
    """c at its beginning. The paper: 1."""

    facts: ClassVar[Facts] = Facts(
        paper="Jiang et al. 2023, arXiv 2304.14647", passes="1 to 2", memory="0; 1 while perturbed",
        needs="the length of the run",
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        require_share("decay", self.decay)
        for name, value in (("lambda1", self.lambda1), ("lambda2", self.lambda2)):
            require(isinstance(value, int | float) and math.isfinite(value), name, value, "a number")
        require(self.every == 1, "every", self.every, "1: ae_sam chooses its steps itself")

    @property
    def over_the_run(self) -> dict[str, Scheduled]:
        """c, from lambda2 to lambda1; a number where they are one."""
        moves = self.lambda1 != self.lambda2
        return {C: {"start": self.lambda2, "end": self.lambda1} if moves else self.lambda1}

    def init(self, space: ParameterSpace) -> State:
        return {**super().init(space), "mean": 0.0, "variance": math.exp(-10)}

    def passes_at(self, step: int) -> int:
        return 1  # whether there is a second is not known before the first

    def gradient(self, space: ParameterSpace, oracle: Oracle, state: dict[str, Any]) -> Vector:
        c = value_at(C, self.over_the_run[C], oracle.clock)
        g = oracle.gradient()
        n = space.norm(g) ** 2
        mean = self.decay * state["mean"] + (1 - self.decay) * n
        variance = self.decay * state["variance"] + (1 - self.decay) * (n - mean) ** 2
        state["mean"], state["variance"] = mean, variance
        if n < mean + c * math.sqrt(variance):
            return g
        with self.up(space, oracle, g):
            return oracle.gradient()
