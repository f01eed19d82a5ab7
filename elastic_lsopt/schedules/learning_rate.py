"""The learning rate, a function of committed samples: a warm-up on a line from 0, then one of these shapes.

    with t the share of the run that is done, w that of the warm-up, d that of the decay:
    constant                1
    linear                  1 - (t - w) / (1 - w)
    cosine                  (1 + cos(pi (t - w) / (1 - w))) / 2
    warmup_stable_decay     1 until t = 1 - d; then f(x) (1 - m) + m with x = (t - (1 - d)) / d, m = min_lr_ratio and
                            f(x) = 1 - x (linear), (1 + cos(pi x)) / 2 (cosine) or 1 - sqrt(x) (1-sqrt)
    inverse_sqrt            sqrt(T / (s - W + T)), s committed samples, W those of the warm-up, T = timescale_samples

They are Hugging Face's, by its names, on samples in place of steps. warmup_stable_decay: Hu et al., "MiniCPM", 2024,
arXiv 2404.06395; 1-sqrt and d of 0.1 to 0.2: Haegele, Bakouch, Kosson, Ben Allal, Von Werra, Jaggi: "Scaling Laws and
Compute-Optimal Training Beyond Fixed Training Durations", NeurIPS 2024, arXiv 2405.18392. inverse_sqrt: Zhai,
Kolesnikov, Houlsby, Beyer, "Scaling Vision Transformers", CVPR 2022, arXiv 2106.04560.

Differs from Hugging Face's in: inverse_sqrt without a warm-up has no timescale of its own (there 10,000 steps).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from elastic_lsopt.errors import UserError
from elastic_lsopt.oracle.clock import SampleClock

Shape = Literal["constant", "linear", "cosine", "warmup_stable_decay", "inverse_sqrt"]


@dataclass(frozen=True, kw_only=True)
class LearningRate:
    """`at(clock)` is the rate of the step that begins there. Raises UserError for an inverse_sqrt without a timescale.

    >>> LearningRate(peak=0.1, shape="linear").at(SampleClock(samples=75, total_samples=100))
    0.025
    """

    peak: float
    """Highest rate; >= 0."""
    shape: Shape = "constant"
    warmup: float = 0.0
    """Share of the run over which the rate rises from 0 to its peak, in [0, 1)."""
    decay_ratio: float = 0.1
    """d: share of the run at its end over which warmup_stable_decay falls; > 0, and with the warm-up at most 1."""
    decay_type: Literal["linear", "cosine", "1-sqrt"] = "1-sqrt"
    """f: how it falls there."""
    min_lr_ratio: float = 0.0
    """m: the share of the peak at which it ends, in [0, 1]."""
    timescale_samples: int | None = None
    """T of inverse_sqrt: samples after the warm-up at which the rate is the peak over sqrt 2; None: the warm-up's."""

    def __post_init__(self) -> None:
        if self.shape == "inverse_sqrt" and self.timescale_samples is None and not self.warmup:
            raise UserError("inverse_sqrt needs timescale_samples, or a warm-up whose samples it takes for them.")
        if self.shape == "warmup_stable_decay" and not 0 < self.decay_ratio <= 1 - self.warmup:
            raise UserError(
                f"decay_ratio={self.decay_ratio:g} must be > 0 and, with the warm-up's {self.warmup:g}, at most 1."
            )

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
            case "cosine":
                return (1 + math.cos(math.pi * left)) / 2
            case "warmup_stable_decay":
                return self._decayed(max(0.0, (t - (1 - self.decay_ratio)) / self.decay_ratio))
            case "inverse_sqrt":
                warm = clock.at_share(self.warmup, "inverse_sqrt")
                timescale = self.timescale_samples or warm
                return math.sqrt(timescale / (clock.samples - warm + timescale))

    def _decayed(self, x: float) -> float:
        match self.decay_type:
            case "linear":
                share = 1 - x
            case "cosine":
                share = (1 + math.cos(math.pi * x)) / 2
            case "1-sqrt":
                share = 1 - math.sqrt(x)
        return share * (1 - self.min_lr_ratio) + self.min_lr_ratio
