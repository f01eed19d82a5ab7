"""GRAWA: replicas are pulled to a mean in which those count more whose gradients are short, because they lie flatter.

    n_i       norms of replica i's parameters' gradients, on samples that it has not stepped on
    A <- b A + (1 - b) n,   A^ = A / (1 - b^k)                                     k exchanges
    MGRAWA    w_i = (1 / sum_l A^_il) / sum_j (1 / sum_l A^_jl)                    one weight for the model
    LGRAWA    w_il = (1 / A^_il) / sum_j (1 / A^_jl)                               one for each parameter l
    x~ = sum_i w_i x_i;   x_i <- (1 - pull) x_i + pull x~

Dimlioglu, Choromanska: "GRAWA: Gradient-based Weighted Averaging for Distributed Training of Deep Learning Models",
AISTATS 2024, arXiv 2403.04206, with the constants and the running mean of the authors' code (b = 0.9^8; MGRAWA sums
the norms of the parameters, it does not take the norm of them all). The plain mean of the replicas is evaluated. Rest
points: equal norms, the plain mean; pull = 0, independent runs. `norms: training` is their experimental form: n is
of the gradients that are stepped with, k and the running mean go by steps, and no gradient is taken for it.

Differs from the authors' code in: 1. the fresh batch is the coming step's, before it steps on it, and not a drawn one;
2. a norm of 0 counts as the smallest number above it, so that its replica takes all the weight, and one that is not
finite takes none; 3. their pull in each step towards the last x~ (`grawa_prox`, off in their runs) is left out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from elastic_lsopt.by_name import require, require_share
from elastic_lsopt.consensus.registry import register
from elastic_lsopt.consensus.replicas import Replicas
from elastic_lsopt.consensus.rule import Rule, require_pull
from elastic_lsopt.errors import NonFinite
from elastic_lsopt.facts import Facts
from elastic_lsopt.oracle.method import State
from elastic_lsopt.oracle.oracle import Oracle
from elastic_lsopt.space.geometry import ParameterSpace
from elastic_lsopt.space.vector import Vector

TINY = torch.finfo(torch.float64).tiny


@dataclass(frozen=True, kw_only=True)
class _GRAWA(Rule):
    pull: float = 0.5
    """c2, how far towards the weighted mean; >= 0 and <= 1. The authors: 0.5."""
    decay: float = 0.43046721
    """b, of the running mean of norms; >= 0 and < 1. The authors: 0.9^8 per exchange, 0.85 per step of training."""
    norms: Literal["fresh", "training"] = "fresh"
    """fresh: of a gradient at each exchange, on samples of the coming step; training: of each step's own."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_pull(self.pull)
        require_share("decay", self.decay)
        require(self.norms in ("fresh", "training"), "norms", self.norms, "fresh or training")

    def named(self, norms: dict[str, float]) -> dict[str, float]:
        """What is averaged and told, of the norms by parameter."""
        return norms

    def shares(self, told: Tensor) -> Any:
        """The weights of the members, of `told`, a row each."""
        told = told.clamp(min=TINY)
        inverse = told.min(0).values / told  # at most 1: a sum of 1 / TINY would be infinite
        return (inverse / inverse.sum(0)).tolist()

    def init(self, space: ParameterSpace) -> State:
        return {"k": 0}

    def before_step(self, space: ParameterSpace, gradient: Vector, samples: int, state: dict[str, Any]) -> None:
        if self.norms == "training":
            state.update(self._averaged(space, gradient, state))

    def exchange(self, replicas: Replicas, space: ParameterSpace, oracle: Oracle | None, state: dict[str, Any]) -> Any:
        new = self._fresh(space, oracle, state) if self.norms == "fresh" else {}
        now = {**state, **(new or {})}
        known = now["k"] > 0 and new is not None
        names = self.named({p.name: 0.0 for p in space.layout.parameters})
        told = replicas.numbers(*(now[f"A/{n}"] / (1 - self.decay ** now["k"]) if known else math.inf for n in names))
        if not bool((told < math.inf).any(0).all()):
            raise NonFinite("no replica has a finite gradient to be weighted by")
        return new or {}, replicas.mean(space.weights, self.shares(told))

    def settle(self, heard: Any, space: ParameterSpace, state: dict[str, Any]) -> None:
        new, mean = heard
        state.update(new)
        space.weights.lerp_(mean, self.pull)

    def _fresh(self, space: ParameterSpace, oracle: Oracle | None, state: dict[str, Any]) -> dict[str, Any] | None:
        """The running means with a gradient of now (no samples: without); None where that is not finite."""
        if oracle is None:
            return {}
        try:
            with oracle.aside():
                return self._averaged(space, oracle.gradient(), state)
        except NonFinite:
            return None

    def _averaged(self, space: ParameterSpace, gradient: Vector, state: dict[str, Any]) -> dict[str, Any]:
        """The running means after one more gradient (collective in the replica)."""
        norms = space.norm_per_parameter(gradient).values.tolist()
        now = self.named({p.name: n for p, n in zip(space.layout.parameters, norms, strict=True)})
        means = {f"A/{n}": self.decay * state.get(f"A/{n}", 0.0) + (1 - self.decay) * norm for n, norm in now.items()}
        return {"k": state["k"] + 1, **means}


@register("mgrawa")
@dataclass(frozen=True, kw_only=True)
class MGRAWA(_GRAWA):
    """MGRAWA: replicas are pulled to a mean in which those with short gradients count more, one weight for the model.

    Cost: a gradient per exchange (`norms: training`: none, and an all-reduce of a number per parameter per step).
    Memory: two Vectors within an exchange. Communication: one reduction of a Vector and a number to all per
    exchange. Raises UserError for a value out of range."""

    facts: ClassVar[Facts] = Facts(
        paper="Dimlioglu, Choromanska 2024, arXiv 2403.04206", passes="1 per tau steps",
        memory="0; 2 within an exchange", communication="a reduction and a number per tau steps",
    )  # fmt: skip

    def named(self, norms: dict[str, float]) -> dict[str, float]:
        return {"model": math.fsum(norms.values())}

    def shares(self, told: Tensor) -> Any:
        return [share for [share] in super().shares(told)]


@register("lgrawa")
@dataclass(frozen=True, kw_only=True)
class LGRAWA(_GRAWA):
    """LGRAWA: replicas are pulled to a mean in which those with short gradients count more, parameter by parameter.

    Cost: a gradient per exchange (`norms: training`: none, and an all-reduce of a number per parameter per step).
    Memory: two Vectors within an exchange. Communication: one reduction of a Vector and a number per
    parameter to all per exchange. Raises UserError for a value out of range."""

    facts: ClassVar[Facts] = Facts(
        paper="Dimlioglu, Choromanska 2024, arXiv 2403.04206", passes="1 per tau steps",
        memory="0; 2 within an exchange", communication="a reduction and a number per parameter per tau steps",
    )  # fmt: skip
