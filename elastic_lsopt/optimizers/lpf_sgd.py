"""LPF-SGD: the gradient of the loss smoothed by a Gaussian, one draw a part of the batch.

    cut the batch into M parts; for m = 1 .. M:
        eps_m ~ N(0, gamma_t^2 Sigma)      a row r of a matrix or filter: std gamma_t ||W_r||; a vector p: gamma_t ||p||
        g    += 1/M grad L_m(w + eps_m)
    w <- base step with g
    gamma_t = gamma0 ((alpha - 1) (1 - cos(pi t / T)) / 2 + 1)

Bisla, Wang, Choromanska: "Low-Pass Filtering SGD for Recovering Flat Optima in the Deep Learning Optimization
Landscape", AISTATS 2022, arXiv 2201.08025, Algorithm 1. Rest point: gamma = 0.

Each draw uses its own share of the batch, so the arithmetic is that of the base: it is gradient accumulation with other
noise in each part. The authors' LPF-Adam, for translation, is this gradient with Adam as base.

t / T runs on committed samples. Differs from the authors' code in: 1. their whole-vector norm for
1-D parameters has 1e-16 added, which changes no float; 2. parts weigh what their samples or tokens weigh.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

from elastic_lsopt.by_name import require_count, require_number
from elastic_lsopt.facts import Facts
from elastic_lsopt.optimizers.perturbed import Perturb, chosen, masked, require_perturb
from elastic_lsopt.optimizers.registry import register
from elastic_lsopt.optimizers.scheduled import Scheduled
from elastic_lsopt.oracle.method import State
from elastic_lsopt.oracle.oracle import Oracle
from elastic_lsopt.space.geometry import ParameterSpace
from elastic_lsopt.space.vector import Vector

GAMMA = "gamma (a number with alpha: 1)"


@register("lpf_sgd")
@dataclass(frozen=True, kw_only=True)
class LPFSGD:
    """Cost: one pass in M parts (no extra gradient). Memory: SAM's one shard while perturbed; noise is drawn in blocks.

    Communication: one all-reduce of a number a row and step; on ZeRO one gather of the weights a part.
    Raises UserError for a value out of range, a batch of fewer micro-batches than M, or alpha != 1 where the length of
    the run is not known.
    """

    parts: int = 8
    """M: parts of the batch, one draw each; >= 1. The paper: 1 without, 8 with data augmentation."""
    gamma: float = 0.0005
    """gamma0: standard deviation at the start, relative to a row's norm; >= 0."""
    alpha: float = 15.0
    """gamma at the end of the run over gamma0; >= 0 (1: constant)."""
    perturb: Perturb = field(default_factory=dict)
    """Which parameters move, by patterns of names: {match: …, exclude: ["*norm*"], dims: 2}; {}: all."""

    facts: ClassVar[Facts] = Facts(
        paper="Bisla et al. 2022, arXiv 2201.08025", passes="1, in M parts", memory="0; 1 while perturbed",
        communication="an all-reduce of a number per row", needs="M micro-batches",
    )  # fmt: skip

    def __post_init__(self) -> None:
        require_count("parts", self.parts)
        require_number("gamma", self.gamma)
        require_number("alpha", self.alpha)
        require_perturb(self.perturb)

    def init(self, space: ParameterSpace) -> State:
        chosen(self.perturb, space)  # refuses what matches nothing
        return {}

    @property
    def over_the_run(self) -> dict[str, Scheduled]:
        """What needs the run's length."""
        if self.alpha == 1:
            return {}
        return {GAMMA: {"start": self.gamma, "end": self.alpha * self.gamma, "shape": "cosine"}}

    def gamma_at(self, progress: float) -> float:
        """gamma_t for the share t / T of the run that is done."""
        return self.gamma * ((self.alpha - 1) * (1 - math.cos(math.pi * progress)) / 2 + 1)

    def gradient(self, space: ParameterSpace, oracle: Oracle, state: State) -> Vector:
        std = self.gamma_at(oracle.clock.progress) * space.norm_per_row(space.weights)
        std = masked(std, chosen(self.perturb, space), space)
        with space.perturbation() as walk, oracle.accumulating() as total:
            for m, part in enumerate(oracle.parts(self.parts)):
                walk.restart(space.noise(oracle.step, m), std)
                part.backward()
        return total.gradient
