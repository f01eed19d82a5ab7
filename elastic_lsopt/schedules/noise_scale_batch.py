"""The batch that follows the gradient noise scale, as measured on the way: larger once the noise is.

    B_noise = tr(S) / |G|^2                                         adascale.py's estimate, S the covariance per sample
    wanted  = multiple * B_noise, within the bounds and within `growth` of the batch, in whole micro-batches
    B       <- wanted, at most once per `every_samples`, where it differs by at least the factor `hysteresis`

McCandlish, Kaplan, Amodei and the OpenAI Dota Team: "An Empirical Model of Large-Batch Training", 2018, arXiv
1812.06162: a step on B_noise samples takes half of the progress of a step on all, and B_noise grows as the loss falls
(section 2.3, and 5.1 for batches that follow it). Rest point: max = min, the constant batch.

Differs from the paper in: 1. their adaptive batch also follows the noise downwards; here by default it only grows,
because the estimate is noisy and a step back wastes what a change costs; 2. its estimator is that between steps:
adascale.py says why, and that a gradient that changes from step to step errs towards more noise.

The decision is one of numbers that all ranks have summed alike. Two world sizes sum in another order, so a measurement
that lies within rounding of a decision's limit may decide differently there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from elastic_lsopt.oracle.family import Family, Stateful
from elastic_lsopt.oracle.method import State
from elastic_lsopt.oracle.step_report import StepReport
from elastic_lsopt.schedules.adascale import GAIN, Gain, GainMonitor, gain_of
from elastic_lsopt.space.geometry import ParameterSpace
from elastic_lsopt.space.vector import Vector

BATCH_NOW, LOOKED = "batch", "window"


@dataclass(frozen=True, kw_only=True)
class NoiseScaleBatch(Stateful):
    """Measures as `GainMonitor` does, and decides; a state family under its name. Costs and memory: its.

    The values are checked where they are read from a job's settings (`config/schedules.py`).
    """

    smallest: int
    """The batch at the beginning, and the least."""
    largest: int
    microbatch: int
    """Samples; divides both."""
    every_samples: int
    """Committed samples between two looks."""
    horizon_samples: float
    """Samples after which a measurement's weight has fallen to 1/e."""
    multiple: float = 1.0
    """Of B_noise; the paper's balance of time and compute is 1."""
    hysteresis: float = 1.25
    """The least factor of a change."""
    growth: float = 2.0
    """The largest factor of a change: an early estimate of |G|^2 may be near 0, and B_noise without a bound."""
    may_shrink: bool = False
    name: str = GAIN
    same_on_all_replicas: bool = False

    @property
    def _monitor(self) -> GainMonitor:
        return GainMonitor(horizon_samples=self.horizon_samples)

    def init(self, space: ParameterSpace) -> State:
        return {**self._monitor.init(space), BATCH_NOW: self.smallest, LOOKED: 0}

    def before_step(self, space: ParameterSpace, gradient: Vector, samples: int, state: dict[str, Any]) -> None:
        self._monitor.before_step(space, gradient, samples, state)

    def after_step(self, space: ParameterSpace, report: StepReport, state: dict[str, Any]) -> None:
        window = report.clock.window(self.every_samples)
        gain = gain_of(state)
        if window <= state[LOOKED] or gain is None:
            return
        state[LOOKED] = window
        state[BATCH_NOW] = self.decided(state[BATCH_NOW], gain)

    def decided(self, batch: int, gain: Gain) -> int:
        """The batch after a look that has found `gain`, where it was `batch`."""
        low = max(self.smallest, batch / self.growth) if self.may_shrink else batch
        aimed = min(max(self.multiple * gain.noise_scale, low), self.largest, batch * self.growth)
        wanted = min(max(round(aimed / self.microbatch) * self.microbatch, self.smallest), self.largest)
        return wanted if max(wanted / batch, batch / wanted) >= self.hysteresis else batch


def batch_now(families: Mapping[str, Family], smallest: int) -> int:
    """The batch that an engine's families have decided on; `smallest` where nothing has begun."""
    state = families[GAIN].state_dict() if GAIN in families else {}
    now = state.get(BATCH_NOW, smallest)
    assert isinstance(now, int | float) and math.isfinite(now)
    return int(now)
