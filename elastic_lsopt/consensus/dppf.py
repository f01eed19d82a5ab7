"""DPPF: replicas are pulled to their mean and pushed off it, so that they settle at a chosen distance: a wide valley.

    r_i = ||x_i - x_A||;   x_i <- x_i + (x_A - x_i) (pull - push / r_i)              x_A the mean

Dimlioglu, Choromanska: "Communication-Efficient Distributed Training for Collaborative Flat Optima Recovery in Deep
Learning", arXiv 2507.20424. Where gradients even out, r goes to push / pull: from r, (1 - pull) r + push. Rest point:
push = 0, soft averaging (`local_sgd` with that pull). The mean is evaluated.

Differs from the paper in: 1. a replica at the mean itself (r = 0, as all are before the first step) is not pushed,
because there is no direction; 2. the push does not change on the way, where the paper's schedule could not be read.
Each replica counts alike, whatever its samples. The defaults are those of the law's example, not the paper's, which
could not be read either.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from elastic_lsopt.by_name import require_number
from elastic_lsopt.consensus.registry import register
from elastic_lsopt.consensus.replicas import Replicas
from elastic_lsopt.consensus.rule import Rule, equal, require_pull
from elastic_lsopt.facts import Facts
from elastic_lsopt.oracle.oracle import Oracle
from elastic_lsopt.space.geometry import ParameterSpace


@register("dppf")
@dataclass(frozen=True, kw_only=True)
class DPPF(Rule):
    """Cost: none beside the steps. Memory: two Vectors within an exchange. Communication: one reduction of a Vector per
    exchange, and in each replica one of a number. Raises UserError for a value out of range."""

    pull: float = 0.1
    """alpha, how far towards the mean; >= 0 and <= 1."""
    push: float = 0.5
    """lambda, how far off the mean, as a length; >= 0. The valley's width is push / pull."""

    facts: ClassVar[Facts] = Facts(
        paper="Dimlioglu, Choromanska 2025, arXiv 2507.20424", passes="0", memory="0; 2 within an exchange",
        communication="a reduction per tau steps",
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        require_pull(self.pull)
        require_number("push", self.push)

    def exchange(self, replicas: Replicas, space: ParameterSpace, oracle: Oracle | None, state: dict[str, Any]) -> Any:
        towards = replicas.mean(space.weights, equal(replicas)).add_(space.weights, alpha=-1.0)
        return towards, space.norm(towards)

    def settle(self, heard: Any, space: ParameterSpace, state: dict[str, Any]) -> None:
        towards, r = heard
        space.weights.add_(towards, alpha=self.pull - (self.push / r if r > 0 else 0.0))
