"""The learning rate, a function of committed samples: warm-up, then constant, a line or half a cosine down to zero."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from elastic_lsopt.oracle.clock import SampleClock


@dataclass(frozen=True, kw_only=True)
class LearningRate:
    """`at(clock)` is the rate of the step that begins there; Hugging Face's shapes, on samples in place of steps.

    >>> LearningRate(peak=0.1, shape="linear").at(SampleClock(samples=75, total_samples=100))
    0.025
    """

    peak: float
    """Highest rate; >= 0."""
    shape: Literal["constant", "linear", "cosine"] = "constant"
    warmup: float = 0.0
    """Share of the run over which the rate rises from 0 to its peak, in [0, 1)."""

    def at(self, clock: SampleClock) -> float:
        return self.peak * self.share(clock)

    def share(self, clock: SampleClock) -> float:
        """The rate over its peak, in [0, 1]."""
        t = clock.progress
        if t < self.warmup:
            return t / self.warmup
        left = (t - self.warmup) / (1 - self.warmup)
        match self.shape:
            case "constant":
                return 1.0
            case "linear":
                return 1 - left
            case _:
                return (1 + math.cos(math.pi * left)) / 2
