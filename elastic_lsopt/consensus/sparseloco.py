"""SparseLoCo: DiLoCo that tells of its steps only the largest parts, in two bits, and keeps the rest for later.

    e_i <- b e_i + eta D_i,   D_i = x_old - x_i;   s_i = Q(top-k of each chunk of e_i);   e_i <- e_i - s_i
    x <- x_old - the mean of all s_i, by samples;   x_i <- x for all i

Sarfi, Thérien, Lidin, Belilovsky: "Communication Efficient LLM Pre-training with SparseLoCo", arXiv 2508.15706, as its
authors run it: k = 64 of 4,096, two bits, no outer momentum, whose place the rest e_i takes. The outer point x is
evaluated. Rest point: k as large as the chunk, as they are (bits 32), and lr = 1: local SGD.

Differs from the authors' code in: 1. what is told of a block in two bits has the scale that fits best, where they have
four bins of the block's own range; 2. a chunk is of what a rank holds, so that how a replica is sharded decides what is
told first; 3. replicas that took more samples count more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from elastic_lsopt.by_name import require_number
from elastic_lsopt.consensus.registry import register
from elastic_lsopt.consensus.replicas import Replicas
from elastic_lsopt.consensus.rule import Rule, by_samples, require_part
from elastic_lsopt.facts import Facts
from elastic_lsopt.oracle.method import State
from elastic_lsopt.oracle.oracle import Oracle
from elastic_lsopt.space.geometry import ParameterSpace
from elastic_lsopt.space.vector import Vector


@register("sparseloco")
@dataclass(frozen=True, kw_only=True)
class SparseLoCo(Rule):
    """Cost: none beside the steps. Memory: two Vectors, 1/N of them per rank; four more within an exchange.
    Communication: k of each chunk to all per exchange. Raises UserError for a value out of range, and for an
    exchange that tells all (without `top_k`)."""

    lr: float = 1.0
    """eta, of the outer step; > 0. The authors: 1."""
    decay: float = 0.95
    """b, what is left of the rest from exchange to exchange; >= 0 and <= 1. The authors: 0.95."""
    tau: int = 30
    """Inner steps; >= 1. The authors: 30."""

    shared: ClassVar[tuple[str, ...]] = ("old",)
    needs_top_k: ClassVar[bool] = True
    facts: ClassVar[Facts] = Facts(
        paper="Sarfi, Thérien, Lidin, Belilovsky 2025, arXiv 2508.15706", passes="0", memory="2; 4 within an exchange",
        communication="k of each chunk to all per tau steps", needs="exchange: {top_k: 64, bits: 2}",
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number("lr", self.lr, positive=True)
        require_part("decay", self.decay)

    def init(self, space: ParameterSpace) -> State:
        return {"old": space.weights.clone()}

    def exchange(
        self, replicas: Replicas, space: ParameterSpace, oracle: Oracle | None, state: dict[str, Any]
    ) -> Vector:
        share = by_samples(replicas)[replicas.place]
        return replicas.sum(state["old"] - space.weights, self.lr * share, keep=self.decay)

    def settle(self, heard: Vector, space: ParameterSpace, state: dict[str, Any]) -> None:
        state["old"].add_(heard, alpha=-1.0)
        space.weights.copy_(state["old"])

    def point(self, replicas: Replicas, space: ParameterSpace, state: State) -> Vector:
        old = state["old"]
        assert isinstance(old, Vector)
        return old.clone()
