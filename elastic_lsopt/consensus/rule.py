"""What a rule of consensus is: how replicas that have drifted apart pull on each other.

Each replica takes its own steps. When it has taken `tau` of them it meets the others:

    heard = rule.exchange(replicas, space, oracle, state)     collectives; nothing changes yet
    rule.settle(heard, space, state)                          each replica alone: move `space.weights`, in place

Between the two all members agree that everything arrived everywhere. Where it did not, `settle` is left out on all of
them and they go on as they were, so no replica is ever averaged by halves. `oracle` is that of the step that comes, on
micro-batches that no step has seen yet.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from elastic_lsopt.by_name import require, require_count
from elastic_lsopt.consensus.replicas import Replicas
from elastic_lsopt.facts import Facts
from elastic_lsopt.oracle.family import Stateful
from elastic_lsopt.oracle.method import State
from elastic_lsopt.oracle.oracle import Oracle
from elastic_lsopt.space.geometry import ParameterSpace
from elastic_lsopt.space.vector import Vector

FAMILY = "consensus"
"""The name of a rule's family of state."""


@dataclass(frozen=True, kw_only=True)
class Rule(Stateful, ABC):
    """A frozen keyword-only dataclass whose fields are the hyper-parameters. Its state is a family like any other:
    `before_step` and `after_step` are called around each step, on this replica alone."""

    name: ClassVar[str] = FAMILY  # type: ignore[misc]
    facts: ClassVar[Facts]

    tau: int = 32
    """Steps from one exchange to the next; >= 1."""

    shared: ClassVar[tuple[str, ...]] = ()
    """What of its state is alike on all replicas that were at all exchanges: who was not gets it from one who was."""

    def __post_init__(self) -> None:
        require_count("tau", self.tau)

    @abstractmethod
    def exchange(self, replicas: Replicas, space: ParameterSpace, oracle: Oracle, state: dict[str, Any]) -> Any:
        """Hear of the others what `settle` needs (collective). Changes nothing: no weight, and nothing in `state`."""

    @abstractmethod
    def settle(self, heard: Any, space: ParameterSpace, state: dict[str, Any]) -> None:
        """Move this replica's weights, and keep in `state` what the next exchange needs. No communication."""

    def point(self, replicas: Replicas, space: ParameterSpace, state: State) -> Vector:
        """The model that the paper evaluates, on all replicas alike (collective). Here: the mean, by samples."""
        return replicas.mean(space.weights)


def require_pull(value: object) -> None:
    """How far a replica goes towards what it is pulled to."""
    require(isinstance(value, int | float) and 0 <= value <= 1, "pull", value, "a number >= 0 and <= 1")
