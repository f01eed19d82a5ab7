"""AdaScale's gain, measured on any sharding: how much a larger batch is worth.

    g_t = G + noise / sqrt(B_t)             E <g_t, g_{t-1}>    = |G|^2                 two batches are independent
                                            E |g_t - g_{t-1}|^2 = S (1/B_t + 1/B_{t-1})
    r = (var + sqr) / (var / k + sqr)       var = S / B the variance at the reference batch, sqr = |G|^2, k = B' / B
    B_noise = S / |G|^2                     samples at which noise and signal are equal

AdaScale: Johnson, Agrawal, Gu, Guestrin, ICML 2020, arXiv 2007.05105: 1 <= r <= k for k >= 1, r = 1 without noise,
r = k in nothing but noise. Noise scale: McCandlish, Kaplan, Amodei, 2018, arXiv 1812.06162 (their B_simple).

Differs from the papers' estimators in: 1. the noise is that between steps, not between the ranks of a step, because a
sharded engine's gradients are summed before anyone sees them; 2. so G must move little from one step to the next: where
it does, its change counts as noise, and the gain errs upwards, towards k; 3. schedules go on in committed samples, k
reference batches a step and not r, so a decay comes at its sample and not later.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from elastic_lsopt.oracle.family import Family, Stateful
from elastic_lsopt.oracle.method import State
from elastic_lsopt.space.geometry import ParameterSpace
from elastic_lsopt.space.vector import Vector

GAIN = "gain"
PREVIOUS, NORM, BATCH = "previous", "previous_square", "previous_batch"
VARIANCE, SQUARE, WEIGHT = "variance", "square", "weight"


@dataclass(frozen=True)
class Gain:
    """A measurement: `variance` S is the trace of a sample's gradient covariance, `square` the estimate of |G|^2."""

    variance: float
    square: float

    def ratio(self, batch: int, larger: int) -> float:
        """r, the worth of a step on `larger` samples in steps on `batch`; between 1 and larger / batch."""
        if self.variance == 0:
            return 1.0
        return (self.variance / batch + self.square) / (self.variance / larger + self.square)

    @property
    def noise_scale(self) -> float:
        """B_noise in samples; inf where no signal was seen."""
        return self.variance / self.square if self.square > 0 else math.inf


@dataclass(frozen=True, kw_only=True)
class GainMonitor(Stateful):
    """Measures gradients on their way to the base optimizer; a state family, `Engine(…, keep=[GainMonitor(…)])`.

    Cost: one `dot` per step (an all-reduce of a number; the norm is known). Memory: one Vector, 1/N per rank. Raises
    ValueError for a horizon that is not > 0.
    """

    horizon_samples: float
    """Samples after which a measurement's weight has fallen to 1/e; about a thousand reference batches."""
    name: str = GAIN
    same_on_all_replicas: bool = False

    def __post_init__(self) -> None:
        if not self.horizon_samples > 0:
            raise ValueError(f"horizon_samples={self.horizon_samples} must be > 0.")

    def init(self, space: ParameterSpace) -> State:
        numbers = dict.fromkeys((NORM, VARIANCE, SQUARE, WEIGHT), 0.0)
        return {PREVIOUS: space.zeros(), BATCH: 0, **numbers}

    def before_step(self, space: ParameterSpace, gradient: Vector, samples: int, state: dict[str, Any]) -> None:
        """Count the gradient of a step on `samples` samples (collective); a non-finite one is passed over."""
        square = space.norm(gradient) ** 2
        if not math.isfinite(square):
            return
        if state[BATCH]:
            dot = space.dot(gradient, state[PREVIOUS])
            variance = (square + state[NORM] - 2 * dot) / (1 / samples + 1 / state[BATCH])
            keep = math.exp(-samples / self.horizon_samples)
            for key, value in ((VARIANCE, variance), (SQUARE, dot), (WEIGHT, 1.0)):
                state[key] = keep * state[key] + (1 - keep) * value
        state[PREVIOUS].copy_(gradient)
        state[NORM], state[BATCH] = square, samples


def measured(families: Mapping[str, Family]) -> Gain | None:
    """The gain that an engine's families hold; None before two steps, or where nothing is measured."""
    return gain_of(families[GAIN].state_dict() if GAIN in families else {})


def gain_of(state: Mapping[str, Any]) -> Gain | None:
    """The gain that a state of GainMonitor's holds; None before two steps."""
    weight = state.get(WEIGHT, 0.0)
    if not weight:
        return None
    return Gain(variance=max(state[VARIANCE], 0.0) / weight, square=max(state[SQUARE], 0.0) / weight)
