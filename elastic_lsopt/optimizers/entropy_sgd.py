"""Entropy-SGD: step towards the mean of a random walk around the weights, which stays where the valley is wide.

    w' = w, m = w
    for l = 1 .. L:   g  = grad L_l(w') + momentum            of the l-th part of the batch
                      w' = w' - eta' (g - gamma_t (w - w') + eps / sqrt(eta' / 2) N(0, 1))
                      m  = a m + (1 - a) w'
    w <- base step with w - m
    gamma_t = min(gamma0 (1 + gamma1)^t, 1)                    t in steps

Chaudhari, Choromanska, Soatto, LeCun, Baldassi, Borgs, Chayes, Sagun, Zecchina: "Entropy-SGD: Biasing Gradient Descent
Into Wide Valleys", ICLR 2017, arXiv 1611.01838, Algorithm 1, with the inner Nesterov momentum, the constants and the
outer gradient (not multiplied by gamma) of the authors' code. Rest point: inner_steps = 0, which is the base.

Differs from the authors' code in: 1. the inner batches are parts of the step's own, so that a step costs one pass and
not L (`batch: whole` takes all of it each time, at L passes); 2. t counts committed samples over those of the first
step, so that a change of the batch keeps the scoping (their Python code never advances it); 3. weight decay is the
base's alone; 4. their first pass at w, whose gradient they do not use, is left out; 5. gamma_t is
bounded, where the paper's grows for ever and throws the walk out from eta' gamma_t = 2 on (6500 steps of the defaults):
by 1, as in Parle (arXiv 1707.00424, the same authors), or by 1 / eta' if that is less, or by gamma0 if that is more.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from elastic_lsopt.by_name import require, require_number, require_share
from elastic_lsopt.facts import Facts
from elastic_lsopt.optimizers.registry import register
from elastic_lsopt.oracle.method import State
from elastic_lsopt.oracle.oracle import Oracle
from elastic_lsopt.space.geometry import ParameterSpace
from elastic_lsopt.space.vector import Vector


@register("entropy_sgd")
@dataclass(frozen=True, kw_only=True)
class EntropySGD:
    """Cost: one pass in L parts (`batch: whole`: L passes). Memory: SAM's one shard and four Vectors within the step.

    Communication: the gradients are reduced in each inner step. Raises UserError for a value out of range, or a batch
    of fewer micro-batches than inner steps.
    """

    inner_steps: int = 5
    """L; >= 0. The paper: 20; the authors of LPF-SGD: 5."""
    gamma0: float = 0.03
    """Pull back to w at the start; >= 0 and < 2 / inner_lr. The paper: 0.03 on CIFAR-10, 1e-4 on MNIST."""
    gamma1: float = 0.001
    """Growth of the pull per step (scoping), up to a pull of 1; >= 0. The paper: 1e-3."""
    noise: float = 1e-4
    """eps, of the Langevin step; >= 0. The paper: 1e-4."""
    inner_lr: float = 0.1
    """eta'; > 0. The paper: 0.1."""
    inner_momentum: float = 0.9
    """Nesterov's, inside a step; >= 0 and < 1. The paper: 0.9."""
    average: float = 0.75
    """a, what an inner step leaves of the mean; >= 0 and < 1. The paper: 0.75."""
    batch: Literal["parts", "whole"] = "parts"
    """What an inner step sees: its own part of the step's batch, or all of it."""

    facts: ClassVar[Facts] = Facts(
        paper="Chaudhari et al. 2017, arXiv 1611.01838", passes="1, in L parts", memory="0; 5 within the step",
        communication="a reduction of the gradients per inner step", needs="L micro-batches",
    )  # fmt: skip

    def __post_init__(self) -> None:
        whole = isinstance(self.inner_steps, int) and self.inner_steps >= 0
        require(whole, "inner_steps", self.inner_steps, "a whole number >= 0")
        for name in ("gamma0", "gamma1", "noise", "inner_lr"):
            require_number(name, getattr(self, name))
        require(self.inner_lr > 0, "inner_lr", self.inner_lr, "a number > 0")
        stable = f"a number < 2 / inner_lr = {2 / self.inner_lr:g}, or each inner step leads further from the weights"
        require(self.gamma0 * self.inner_lr < 2, "gamma0", self.gamma0, stable)
        require_share("inner_momentum", self.inner_momentum)
        require_share("average", self.average)
        require(self.batch in ("parts", "whole"), "batch", self.batch, "parts or whole")

    @property
    def parts(self) -> int:
        return max(self.inner_steps, 1) if self.batch == "parts" else 1

    def passes_at(self, step: int) -> int:
        return max(self.inner_steps, 1)

    def init(self, space: ParameterSpace) -> State:
        return {"samples_per_step": 0.0}

    def gradient(self, space: ParameterSpace, oracle: Oracle, state: dict[str, Any]) -> Vector:
        if not self.inner_steps:
            return oracle.gradient()
        gamma, kick = self._gamma(oracle, state), self.noise / math.sqrt(self.inner_lr / 2)
        away, mean, v = space.zeros(), space.zeros(), space.zeros()  # w' - w, m - w, the inner momentum
        parts = oracle.parts(self.parts) if self.batch == "parts" else [None] * self.inner_steps
        with space.perturbation() as walk:
            for number, part in enumerate(parts):
                if number:
                    walk.restart(away)
                g = oracle.gradient(part)
                v.mul_(self.inner_momentum).add_(g)
                step = v * self.inner_momentum
                step.add_(g).add_(away, alpha=gamma)
                if kick:
                    step.add_(space.noise(oracle.step, number).vector(), alpha=kick)
                away.add_(step, alpha=-self.inner_lr)
                mean.lerp_(away, 1 - self.average)
        return mean.mul_(-1.0)

    def _gamma(self, oracle: Oracle, state: dict[str, Any]) -> float:
        clock = oracle.clock
        if clock.steps and not state["samples_per_step"]:
            state["samples_per_step"] = clock.samples / clock.steps
        t = clock.samples / state["samples_per_step"] if state["samples_per_step"] else 0.0
        if not self.gamma0:
            return 0.0
        most = max(min(1.0, 1 / self.inner_lr), self.gamma0)
        # By logarithms, as the power of a long run is larger than any float.
        return self.gamma0 * math.exp(min(t * math.log1p(self.gamma1), math.log(most) - math.log(self.gamma0)))
