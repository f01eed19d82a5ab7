"""AL-DSGD: each replica talks to a few neighbours, who change from exchange to exchange, and is drawn to two of them.

    y <- (1 - d_i a) x_i + a sum_j x_j                     over the d_i neighbours j of this exchange
    y <- (1 - c1 - c2) y + c1 x_B + c2 x_D                 B: the smallest loss, D: the most neighbours; i itself counts
    x_i <- y - p1 (y - x_B) - p2 (y - x_D)

He, Wang, Choromanska: "Adjacent Leader Decentralized Stochastic Gradient Descent", ECAI 2024, arXiv 2405.11389, in the
order of the authors' code, on MATCHA's matchings (Wang, Sahu, Yang, Joshi, Kar, arXiv 1905.09435). The replicas' graph
is parted into matchings, of which the exchanges use the share `budget` in the mean, in turns: the dynamic graphs. Who
has no neighbour in an exchange stays where it is. The loss is that of the last step. The mean of the replicas is
evaluated. Rest point: c1 = c2 = p1 = p2 = 0, D-PSGD on these graphs, which leaves the mean of all replicas as it is.

Differs from the papers in: 1. matchings take turns, where MATCHA draws them; 2. a = 1 / (1 + the most neighbours that
any replica has), which is stable on each graph, where MATCHA solves for a; 3. lines 2 and 3 are taken at every
exchange, where the authors' code mixes after every step and takes them now and then. Ties go to i itself, as there,
and then to the lowest number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, ClassVar, Literal

from elastic_lsopt.by_name import require
from elastic_lsopt.consensus.registry import register
from elastic_lsopt.consensus.replicas import Replicas
from elastic_lsopt.consensus.rule import Rule, loss_of
from elastic_lsopt.facts import Facts
from elastic_lsopt.oracle.oracle import Oracle
from elastic_lsopt.oracle.step_report import StepReport
from elastic_lsopt.space.geometry import ParameterSpace
from elastic_lsopt.space.vector import Vector

Graph = Literal["ring", "exponential", "complete"]
GRAPHS = ("ring", "exponential", "complete")


def edges(graph: Graph, size: int) -> list[tuple[int, int]]:
    """Between places 0 .. size - 1, each once, in ascending order."""
    if graph == "complete":
        return [*combinations(range(size), 2)]
    hops = [1] if graph == "ring" else [2**k for k in range(max(size - 1, 1).bit_length()) if 2**k < size]
    found = {tuple(sorted((i, (i + hop) % size))) for i in range(size) for hop in hops}
    return sorted((i, j) for i, j in found if i != j)


def matchings(given: Sequence[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """The edges parted so that in no part two of them meet: each goes to the first part where it fits."""
    parts: list[list[tuple[int, int]]] = []
    for edge in given:
        for part in parts:
            if all(not {*edge} & {*other} for other in part):
                part.append(edge)
                break
        else:
            parts.append([edge])
    return parts


def active(graph: Graph, size: int, budget: float, number: int) -> list[tuple[int, int]]:
    """The edges of exchange `number`: the next matchings in turn, so many that all exchanges so far have used the share
    `budget`, rounded up."""
    parts = matchings(edges(graph, size))
    first, end = (math.ceil(round(n * budget * len(parts), 6)) for n in (number, number + 1))
    return sorted(edge for i in range(first, end) for edge in parts[i % len(parts)])


@register("al_dsgd")
@dataclass(frozen=True, kw_only=True)
class ALDSGD(Rule):
    """Cost: none beside the steps. Memory: within an exchange a Vector per neighbour and one more. Communication: a
    Vector to each neighbour and a number to all per exchange. Raises UserError for a value out of range, and for a
    method that tells no loss."""

    tau: int = 1
    """Steps from one exchange to the next; >= 1. The paper: 1."""
    graph: Graph = "ring"
    """Who may be neighbours: ring, exponential (1, 2, 4 … further), complete."""
    budget: float = 0.5
    """Share of the matchings that exchanges use in the mean; > 0 and <= 1. The authors: 0.5."""
    c1: float = 0.3
    """Weight of the best neighbour; >= 0. The authors: 0.3."""
    c2: float = 0.1
    """Weight of the neighbour with the most neighbours; >= 0, and c1 + c2 <= 1. The authors: 0.1."""
    p1: float = 0.2
    """Force towards the best; >= 0. The authors: 0.2."""
    p2: float = 0.2
    """Force towards the one with the most; >= 0, and p1 + p2 <= 1. The authors: 0.2."""

    in_few_bits: ClassVar[bool] = False
    facts: ClassVar[Facts] = Facts(
        paper="He, Wang, Choromanska 2024, arXiv 2405.11389", passes="0",
        memory="0; 1 and 1 per neighbour within an exchange",
        communication="a message to each neighbour and a number per tau steps",
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.graph in GRAPHS, "graph", self.graph, f"one of {', '.join(GRAPHS)}")
        share = isinstance(self.budget, int | float) and 0 < self.budget <= 1
        require(share, "budget", self.budget, "a number > 0 and <= 1")
        for one, two in (("c1", "c2"), ("p1", "p2")):
            values = (getattr(self, one), getattr(self, two))
            right = all(isinstance(v, int | float) and v >= 0 for v in values) and sum(values) <= 1
            require(right, f"{one}, {two}", values, "numbers >= 0 whose sum is <= 1")

    def sent_vectors(self, replicas: int) -> float:
        return 2 * self.budget * len(edges(self.graph, replicas)) / replicas  # one each way along an edge

    def after_step(self, space: ParameterSpace, report: StepReport, state: dict[str, Any]) -> None:
        state["loss"] = loss_of(report, "al_dsgd")

    def exchange(
        self, replicas: Replicas, space: ParameterSpace, oracle: Oracle | None, state: dict[str, Any]
    ) -> list[Vector]:
        """Where this replica goes; nothing where it has no neighbour."""
        size, me = len(replicas.members), replicas.place
        now = active(self.graph, size, self.budget, replicas.last)
        degrees = [sum(i in edge for edge in now) for i in range(size)]
        losses = replicas.numbers(state.get("loss", math.inf))[:, 0].tolist()
        near = sorted({i for edge in now if me in edge for i in edge} - {me})
        if not near:
            return []
        received = replicas.swapped(space.weights, [replicas.members[i] for i in near])
        point = {i: received[replicas.members[i]] for i in near} | {me: space.weights}
        a = 1 / (1 + max(degrees))
        y = space.weights * (1 - degrees[me] * a)
        for i in near:
            y.add_(point[i], alpha=a)
        here = [me, *near]
        best = point[min(here, key=lambda i: losses[i])]
        most = point[max(here, key=lambda i: degrees[i])]
        y.mul_(1 - self.c1 - self.c2).add_(best, alpha=self.c1).add_(most, alpha=self.c2)
        return [y.mul_(1 - self.p1 - self.p2).add_(best, alpha=self.p1).add_(most, alpha=self.p2)]

    def settle(self, heard: Sequence[Vector], space: ParameterSpace, state: dict[str, Any]) -> None:
        for point in heard:
            space.weights.copy_(point)
