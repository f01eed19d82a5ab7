"""RWP: a gradient at randomly perturbed weights beside one at the weights, each on its own half of the batch.

    cut the batch into halves 0 and 1
    z ~ N(0, gamma^2 Sigma)               a row r of a matrix: std gamma ||W_r||; a vector p: gamma ||p||
    w <- base step with alpha grad L_0(w + z) + (1 - alpha) grad L_1(w)

Li, Tao, Yan, Lei, Wu, Wang, Shao, Cheng, Huang: "Revisiting Random Weight Perturbation for Efficiently Improving
Generalization", TMLR 2024, arXiv 2404.00357, the mixed form (m-RWP). Rest point: gamma = 0 with alpha the share of
half 0, which is the base.

The authors give each half of their devices a batch of its own; here a half is one of the step's own, so the arithmetic
is that of the base.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from elastic_lsopt.by_name import require
from elastic_lsopt.facts import Facts
from elastic_lsopt.optimizers.perturbed import Perturb, chosen, masked, require_perturb
from elastic_lsopt.optimizers.registry import register
from elastic_lsopt.optimizers.scheduled import Scheduled, require_scheduled, value_at
from elastic_lsopt.oracle.method import State
from elastic_lsopt.oracle.oracle import Oracle
from elastic_lsopt.space.geometry import ParameterSpace
from elastic_lsopt.space.vector import Vector


@register("rwp")
@dataclass(frozen=True, kw_only=True)
class RWP:
    """Cost: one pass in two parts. Memory: SAM's one shard while perturbed, and one Vector within the step.

    Communication: one all-reduce of a number per row, and a second reduction of the gradients. Raises UserError for a
    value out of range, or a batch of one micro-batch.
    """

    gamma: Scheduled = 0.01
    """Standard deviation relative to a row's norm; >= 0, or a schedule. The paper: 0.01 on CIFAR, 0.005 on ImageNet."""
    alpha: float = 0.5
    """Weight of the perturbed half; in [0, 1]. The paper: 0.5."""
    perturb: Perturb = field(default_factory=dict)
    """Which parameters move, by patterns of names: {match: …, exclude: ["*norm*"], dims: 2}; {}: all."""

    facts: ClassVar[Facts] = Facts(
        paper="Li et al. 2024, arXiv 2404.00357", passes="1, in 2 parts", memory="0; 2 within the step",
        communication="an all-reduce of a number per row, a second reduction of the gradients",
        needs="two micro-batches",
    )  # fmt: skip
    parts = 2

    def __post_init__(self) -> None:
        require_scheduled("gamma", self.gamma)
        share = isinstance(self.alpha, int | float) and 0 <= self.alpha <= 1
        require(share, "alpha", self.alpha, "a number in [0, 1]")
        require_perturb(self.perturb)

    def init(self, space: ParameterSpace) -> State:
        chosen(self.perturb, space)  # refuses what matches nothing
        return {}

    def passes_at(self, step: int) -> int:
        return 2

    def gradient(self, space: ParameterSpace, oracle: Oracle, state: State) -> Vector:
        std = value_at("gamma", self.gamma, oracle.clock) * space.norm_per_row(space.weights)
        std = masked(std, chosen(self.perturb, space), space)
        first, *rest = oracle.parts(2)
        moved, still = first, rest[0] if rest else first  # the Trainer's last update of an epoch may have one part
        total = oracle.gradient(still).clone().mul_(1 - self.alpha)
        with space.perturbed(space.noise(oracle.step), std):
            return total.add_(oracle.gradient(moved), alpha=self.alpha)
