"""SWA: the mean of the weights that training passes late in its course.

    after the share `start` of the run, once per `every_samples` committed samples:
    a <- a + (w - a) / (n + 1);   n <- n + 1              so a is the mean of the n weights that were taken

Izmailov, Podoprikhin, Garipov, Vetrov, Wilson: "Averaging Weights Leads to Wider Optima and Better Generalization",
UAI 2018, arXiv 1803.05407, algorithm 1, whose cycle c is `every_samples`. Rest point: one weight taken (n = 1), where
the average is that weight.

Differs from the paper in: 1. the cycle is counted in samples and not in steps; 2. the rate is the job's own schedule:
the paper's constant or cyclical rate is `lr_scheduler_type: constant`, or warmup_stable_decay with what is averaged
before the decay; 3. nothing is counted for the weights at which averaging begins but that they are the first that is
taken. It is taken of the fp32 masters. Batch norm's statistics are not the average's: see docs/papers.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from elastic_lsopt.averages.average import Average
from elastic_lsopt.averages.registry import register
from elastic_lsopt.by_name import require_count, require_share
from elastic_lsopt.facts import Facts
from elastic_lsopt.oracle.clock import NO_WINDOW, SampleClock
from elastic_lsopt.oracle.method import State
from elastic_lsopt.oracle.step_report import StepReport
from elastic_lsopt.space.geometry import ParameterSpace
from elastic_lsopt.space.vector import Vector


@register("swa")
@dataclass(frozen=True, kw_only=True)
class SWA(Average):
    """Cost: one read and one write of the average whenever it takes the weights. Memory: one Vector, 1/N per rank.
    Communication: none.

    Until it has taken a first time it is the weights themselves, which the log says. Raises UserError for a value out
    of range, and when an engine is made with it where `start` is a share of a run of unknown length.
    """

    facts: ClassVar[Facts] = Facts(
        paper="Izmailov, Podoprikhin, Garipov, Vetrov, Wilson, 2018, arXiv 1803.05407", passes="0", memory="1"
    )

    start: float = 0.75
    """Share of the run after which weights are taken; >= 0 and < 1. The paper's: 0.75 of the usual training."""
    every_samples: int = 1
    """Committed samples from one taking to the next; 1: after each step, the paper's c = 1. Its results are with an
    epoch, the number of training samples."""

    def __post_init__(self) -> None:
        require_share("start", self.start)
        require_count("every_samples", self.every_samples)

    def first(self, clock: SampleClock) -> float:
        return clock.at_share(self.start, "swa")

    def init(self, space: ParameterSpace) -> State:
        return {"mean": space.weights.clone(), "n": 0, "window": NO_WINDOW}

    def after_step(self, space: ParameterSpace, report: StepReport, state: dict[str, Any]) -> None:
        now = report.clock.window(self.every_samples, first=self.first(report.clock))
        if now <= state["window"]:
            return
        state["window"] = now
        state["mean"].lerp_(space.weights, 1 / (state["n"] + 1))
        state["n"] += 1

    def begun(self, state: dict[str, Any]) -> bool:
        return state["n"] > 0

    def weights(self, space: ParameterSpace, state: dict[str, Any]) -> Vector:
        return state["mean"] if self.begun(state) else space.weights
