"""GRAWA: replicas are pulled to a mean in which those count more whose gradients are short, because they lie flatter.

    n_i       norms of replica i's parameters' gradients, on samples that it has not stepped on
    A <- b A + (1 - b) n,   A^ = A / (1 - b^k)                                     k exchanges
    MGRAWA    w_i = (1 / sum_l A^_il) / sum_j (1 / sum_l A^_jl)                    one weight for the model
    LGRAWA    w_il = (1 / A^_il) / sum_j (1 / A^_jl)                               one for each parameter l
    x~ = sum_i w_i x_i;   x_i <- (1 - pull) x_i + pull x~

Dimlioglu, Choromanska: "GRAWA: Gradient-based Weighted Averaging for Distributed Training of Deep Learning Models",
AISTATS 2024, arXiv 2403.04206, with the constants and the running mean of the authors' code (b = 0.9^8; MGRAWA sums
the norms of the parameters, it does not take the norm of them all). Rest point: equal norms, the plain mean.

Differs from the authors' code in: 1. the fresh batch is the coming step's, before it steps on it; 2. a norm of 0 counts
as the smallest number above it, so that its replica takes all the weight; 3. their pull in each step towards the last
x~ (`grawa_prox`, off in their runs) is left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from elastic_lsopt.by_name import require_share
from elastic_lsopt.consensus.registry import register
from elastic_lsopt.consensus.replicas import Replicas
from elastic_lsopt.consensus.rule import Rule, require_pull
from elastic_lsopt.facts import Facts
from elastic_lsopt.oracle.method import State
from elastic_lsopt.oracle.oracle import Oracle
from elastic_lsopt.space.geometry import ParameterSpace

TINY = torch.finfo(torch.float64).tiny


@dataclass(frozen=True, kw_only=True)
class _GRAWA(Rule):
    pull: float = 0.5
    """c2, how far towards the weighted mean; >= 0 and <= 1. The authors: 0.5."""
    decay: float = 0.9**8
    """b, of the running mean of norms; >= 0 and < 1. The authors: 0.9^8."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_pull(self.pull)
        require_share("decay", self.decay)

    def numbers(self, norms: list[float]) -> list[float]:
        """What is averaged over exchanges, and told."""
        return norms

    def shares(self, told: Tensor) -> Any:
        """The weights of the members: of `told`, a row each."""
        inverse = 1 / told.clamp(min=TINY)
        return (inverse / inverse.sum(0)).tolist()

    def init(self, space: ParameterSpace) -> State:
        return {"exchanges": 0}

    def exchange(self, replicas: Replicas, space: ParameterSpace, oracle: Oracle, state: dict[str, Any]) -> Any:
        with oracle.aside():
            now = self.numbers(space.norm_per_parameter(oracle.gradient()).values.tolist())
        k = state["exchanges"] + 1
        means = [self.decay * state.get(f"A/{i}", 0.0) + (1 - self.decay) * n for i, n in enumerate(now)]
        told = replicas.numbers(*(a / (1 - self.decay**k) for a in means))
        return means, replicas.mean(space.weights, self.shares(told))

    def settle(self, heard: Any, space: ParameterSpace, state: dict[str, Any]) -> None:
        means, mean = heard
        state["exchanges"] += 1
        state.update({f"A/{i}": a for i, a in enumerate(means)})
        space.weights.lerp_(mean, self.pull)


@register("mgrawa")
@dataclass(frozen=True, kw_only=True)
class MGRAWA(_GRAWA):
    """Cost: a gradient per exchange. Memory: one Vector while an exchange is under way. Communication: one reduction of
    a Vector and one of a number per exchange. Raises UserError for a value out of range."""

    facts: ClassVar[Facts] = Facts(
        paper="Dimlioglu, Choromanska 2024, arXiv 2403.04206", passes="1 per tau steps",
        memory="0; 2 within an exchange", communication="a reduction and a number per tau steps",
    )  # fmt: skip

    def numbers(self, norms: list[float]) -> list[float]:
        return [sum(norms)]

    def shares(self, told: Tensor) -> Any:
        return [share for [share] in super().shares(told)]


@register("lgrawa")
@dataclass(frozen=True, kw_only=True)
class LGRAWA(_GRAWA):
    """Cost: a gradient per exchange. Memory: one Vector while an exchange is under way. Communication: one reduction of
    a Vector and a number per parameter per exchange. Raises UserError for a value out of range."""

    facts: ClassVar[Facts] = Facts(
        paper="Dimlioglu, Choromanska 2024, arXiv 2403.04206", passes="1 per tau steps",
        memory="0; 2 within an exchange", communication="a reduction and a number per parameter per tau steps",
    )  # fmt: skip
