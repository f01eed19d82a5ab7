"""EASGD: an elastic force between each replica and a centre that follows them all.

    d_i = x_i - x~;   x_i <- x_i - alpha d_i;   x~ <- x~ + alpha sum_i d_i           alpha = beta / M, M replicas

Zhang, Choromanska, LeCun: "Deep learning with Elastic Averaging SGD", NeurIPS 2015, arXiv 1412.6651, the synchronous
form (equations 2 and 3), every tau steps. The centre x~ is evaluated. Without a gradient the sum of all x_i and x~
stays as it is. Rest point: beta = 0, independent runs.

Differs from the paper in: 1. no process holds the centre; each replica keeps it, cut as its weights are, and all add
the same sum to it; 2. the force and the step with the gradient are taken one after the other, not both from the same
point; 3. M is the number of replicas at the exchange, so M alpha stays beta when some come or go: the centre is stable
for beta <= 1 alone. Each replica counts alike, whatever its samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from elastic_lsopt.consensus.registry import register
from elastic_lsopt.consensus.replicas import Replicas
from elastic_lsopt.consensus.rule import Rule, require_part
from elastic_lsopt.facts import Facts
from elastic_lsopt.oracle.method import State
from elastic_lsopt.oracle.oracle import Oracle
from elastic_lsopt.space.geometry import ParameterSpace
from elastic_lsopt.space.vector import Vector


@register("easgd")
@dataclass(frozen=True, kw_only=True)
class EASGD(Rule):
    """Cost: none beside the steps. Memory: one Vector, the centre; three more within an exchange. Communication: one
    reduction of a Vector per exchange. Raises UserError for a value out of range."""

    beta: float = 0.9
    """M alpha, how far the centre goes; >= 0 and <= 1. The paper: 0.9, tau in {1, 4, 16, 64}; LSGD's authors 0.43."""

    shared: ClassVar[tuple[str, ...]] = ("centre",)
    facts: ClassVar[Facts] = Facts(
        paper="Zhang, Choromanska, LeCun 2015, arXiv 1412.6651", passes="0", memory="1; 3 within an exchange",
        communication="a reduction per tau steps",
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        require_part("beta", self.beta, ", beyond which the centre is not stable")

    def init(self, space: ParameterSpace) -> State:
        return {"centre": space.weights.clone()}

    def exchange(self, replicas: Replicas, space: ParameterSpace, oracle: Oracle | None, state: dict[str, Any]) -> Any:
        alpha = self.beta / len(replicas.members)
        apart = space.weights - state["centre"]
        return alpha, apart, replicas.sum(apart, alpha)

    def settle(self, heard: Any, space: ParameterSpace, state: dict[str, Any]) -> None:
        alpha, apart, drawn = heard
        space.weights.add_(apart, alpha=-alpha)
        state["centre"].add_(drawn)

    def point(self, replicas: Replicas, space: ParameterSpace, state: State) -> Vector:
        centre = state["centre"]
        assert isinstance(centre, Vector)
        return centre.clone()
