"""Flat-LoRA: adapters that are trained where the weights merged with them are noisy.

    W'   = W + s B A                       of every adapted layer, m x n
    E_ij ~ N(0, (f_t sigma ||W'_i|| / sqrt n)^2)          f_t = (1 - cos(pi t / T)) / 2
    g    = grad_{A, B} L at W' + E         one draw per step
    A, B <- base step with g

Li et al.: "Flat-LoRA: Low-Rank Adaptation over a Flat Loss Landscape", arXiv 2409.14396. Rest point: sigma = 0.

t / T runs on committed samples. Differs from the authors' code in: 1. the noise depends on (seed, step, layer, element)
and on no clock, so all ranks and world sizes draw the same; 2. W is not written and written back, which in bf16 does
not restore it: the noise is added beside the layer that runs, in the forward and again in the backward.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from elastic_lsopt.by_name import require_number
from elastic_lsopt.facts import Facts
from elastic_lsopt.optimizers.registry import register
from elastic_lsopt.optimizers.scheduled import Scheduled
from elastic_lsopt.oracle.method import State
from elastic_lsopt.oracle.oracle import Oracle
from elastic_lsopt.space.geometry import ParameterSpace
from elastic_lsopt.space.vector import Vector


@register("flat_lora")
@dataclass(frozen=True, kw_only=True)
class FlatLoRA:
    """Cost: one pass; the noise of an adapted layer is drawn in its forward and in its backward. Memory: one such layer
    for as long as it runs, a number per row, and the adapters whole on each rank.

    Communication: one gather of the adapters per step. Raises UserError for a value out of range, a model without
    adapters, or where the length of the run is not known.
    """

    facts: ClassVar[Facts] = Facts(
        paper="Li et al. 2024, arXiv 2409.14396",
        memory="0; an adapted layer's noise while it runs, and the adapters whole on each rank",
        communication="one gather of the adapters per step",
        needs="adapters (lora:), landscape_space: merged, and the run's length",
    )

    sigma: float = 0.05
    """Standard deviation at the end of the run, relative to a row's root mean square; >= 0. The paper: 0.05 for
    language models, 0.15 for CLIP."""

    parts = 1
    moves_merged = True
    """It moves weights that are no part of the space: `space.merged` is made for it."""

    def __post_init__(self) -> None:
        require_number("sigma", self.sigma)

    def init(self, space: ParameterSpace) -> State:
        return {}

    @property
    def over_the_run(self) -> dict[str, Scheduled]:
        """What needs the run's length."""
        return {"sigma": {"start": 0.0, "end": self.sigma, "shape": "cosine"}}

    def sigma_at(self, progress: float) -> float:
        """f_t sigma for the share t / T of the run that is done."""
        return self.sigma * (1 - math.cos(math.pi * progress)) / 2

    def gradient(self, space: ParameterSpace, oracle: Oracle, state: State) -> Vector:
        assert space.merged is not None
        sigma = self.sigma_at(oracle.clock.progress)
        with space.merged.noised(space.seed, oracle.step, 0, lambda n: sigma / math.sqrt(n)):
            return oracle.gradient()
