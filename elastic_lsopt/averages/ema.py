"""EMA: the exponential moving average of the weights.

    a_0 = w_0
    a_t = rho^k a_{t-1} + (1 - rho^k) w_t          k = B_t / B: samples of this step over the reference's

Polyak, Juditsky: "Acceleration of stochastic approximation by averaging", SIAM J. Control Optim. 30 (1992), with the
exponential weights of Tarvainen, Valpola: "Mean teachers are better role models", 2017, arXiv 1703.01780; the power k
keeps the average's memory in samples where the batch changes: Busbridge et al.: "How to Scale Your EMA", 2023, arXiv
2307.13813, section 2. Rest point: decay = 0, where the average is the weights themselves.

It is taken of the fp32 masters. A skipped step changes nothing. The window is about B / (1 - rho) samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from elastic_lsopt.averages.average import Average
from elastic_lsopt.averages.registry import register
from elastic_lsopt.by_name import require_count, require_share
from elastic_lsopt.facts import Facts
from elastic_lsopt.oracle.method import State
from elastic_lsopt.oracle.step_report import StepReport
from elastic_lsopt.space.geometry import ParameterSpace
from elastic_lsopt.space.vector import Vector


@register("ema")
@dataclass(frozen=True, kw_only=True)
class EMA(Average):
    """Cost: one read and one write of the average per step. Memory: one Vector, 1/N per rank. Communication: none.

    Raises UserError for a decay out of range.
    """

    facts: ClassVar[Facts] = Facts(paper="Polyak, Juditsky 1992; Busbridge et al. 2023, arXiv 2307.13813", memory="1")

    decay: float = 0.999
    """rho: what a step on the first step's batch leaves of the average; >= 0 and < 1."""
    batch: int | None = None
    """B: the samples of a step that `decay` is meant for; None: those of the first step. A YAML's: its
    `global_batch_size`."""

    def __post_init__(self) -> None:
        require_share("decay", self.decay)
        if self.batch is not None:
            require_count("batch", self.batch)

    def init(self, space: ParameterSpace) -> State:
        return {"mean": space.weights.clone(), "batch": self.batch or 0}

    def after_step(self, space: ParameterSpace, report: StepReport, state: dict[str, Any]) -> None:
        state["batch"] = state["batch"] or report.samples
        rho = self.decay ** (report.samples / state["batch"])
        state["mean"].lerp_(space.weights, 1 - rho)

    def weights(self, space: ParameterSpace, state: dict[str, Any]) -> Vector:
        return state["mean"]
