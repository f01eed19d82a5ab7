"""LAWA: the mean of the latest k weights, spaced along the run.

    once per `every_samples` committed samples: the queue takes the weights w, and the oldest of k leaves it
    a = (w_1 + … + w_m) / m                                m <= k weights in the queue

Kaddour: "Stop Wasting My Time! Saving Days of ImageNet and BERT Training with Latest Weight Averaging", 2022, arXiv
2209.14981, equation 1 (k = 6 ends of epochs). For language models: Sanyal, Neerkaje, Kaddour, Kumar, Sanghavi: "Early
Weight Averaging meets High Learning Rates for LLM Pre-training", 2023, arXiv 2306.03241. Rest point: k = 1, where the
average is the latest weights that were taken.

The mean is formed of the k weights where it is asked for. A running sum, to which the newest is added and from which
the oldest is taken, would gather rounding for as long as the job runs; this one has that of k sums. Differs from the
paper in: the queue is fed by samples and not by epochs.
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


@register("lawa")
@dataclass(frozen=True, kw_only=True)
class LAWA(Average):
    """Cost: one copy of the weights whenever the queue takes them. Memory: k Vectors, 1/N of each per rank, and one
    more while the mean is in use. Communication: none.

    Until it has taken a first time it is the weights themselves, which the log says. Raises UserError for a value out
    of range, and when an engine is made with it where `start` is a share of a run of unknown length.
    """

    facts: ClassVar[Facts] = Facts(
        paper="Kaddour, 2022, arXiv 2209.14981", passes="0", memory="k; 1 more while the mean is in use"
    )

    k: int = 6
    """Weights in the queue; >= 1. The paper's: 6."""
    every_samples: int = 1
    """Committed samples from one taking to the next; 1: after each step. The paper's: an epoch, the number of training
    samples."""
    start: float = 0.0
    """Share of the run after which weights are taken; >= 0 and < 1."""

    def __post_init__(self) -> None:
        require_count("k", self.k)
        require_count("every_samples", self.every_samples)
        require_share("start", self.start)

    def first(self, clock: SampleClock) -> float:
        return clock.at_share(self.start, "lawa")

    def init(self, space: ParameterSpace) -> State:
        queue = {_place(i): space.weights.clone() for i in range(self.k)}
        return {**queue, "held": 0, "window": NO_WINDOW}

    def after_step(self, space: ParameterSpace, report: StepReport, state: dict[str, Any]) -> None:
        now = report.clock.window(self.every_samples, first=self.first(report.clock))
        if now <= state["window"]:
            return
        state["window"] = now
        # The newest is always the first, so that a resume with another k has the latest ones.
        oldest = state[_place(self.k - 1)]
        for i in range(self.k - 1, 0, -1):
            state[_place(i)] = state[_place(i - 1)]
        state[_place(0)] = oldest.copy_(space.weights)
        state["held"] = min(state["held"] + 1, self.k)

    def begun(self, state: dict[str, Any]) -> bool:
        return state["held"] > 0

    def weights(self, space: ParameterSpace, state: dict[str, Any]) -> Vector:
        if not self.begun(state):
            return space.weights
        held = min(state["held"], self.k)
        mean = state[_place(0)].clone()
        for i in range(1, held):
            mean.add_(state[_place(i)])
        return mean.mul_(1 / held)


def _place(i: int) -> str:
    """Its name in the state; 0 is the newest."""
    return f"latest_{i}"
