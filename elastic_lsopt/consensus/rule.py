"""What a rule of consensus is: how replicas that have drifted apart pull on each other.

Each replica takes its own steps. When it has taken `every` of them it meets the others:

    told = rule.snapshot(space, state, number)                 this replica alone: what it has to tell
    heard = rule.exchange(replicas, space, oracle, told)       collectives; nothing changes yet
    rule.settle(heard, space, state)                           this replica alone: move `space.weights`, in place

Between the two last all members agree that everything arrived everywhere. Where it did not, `settle` is left out on all
of them and they go on as they were, so no replica is ever averaged by halves. `oracle` is that of the step that comes,
on micro-batches that no step has seen yet.

A rule that streams has one fragment of the parameters exchanged at a time, while steps go on (`overlap` of them): its
`exchange` runs in a thread of its own. There it looks at `replicas`, at what `snapshot` gave, where what steps move is
copied, and at the space's layout; at no weights, no oracle, and nothing that communicates inside the replica.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from elastic_lsopt.by_name import require, require_count
from elastic_lsopt.consensus.replicas import Replicas
from elastic_lsopt.errors import UserError
from elastic_lsopt.facts import Facts
from elastic_lsopt.oracle.family import Stateful
from elastic_lsopt.oracle.method import State
from elastic_lsopt.oracle.oracle import Oracle
from elastic_lsopt.oracle.step_report import StepReport
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
    """What of its state is alike on all replicas that were at all exchanges, Vectors and numbers: who was not gets it
    from one who was."""
    fragments: ClassVar[int] = 1
    """Into how many fragments the parameters are cut, of which each exchange is about one, in turns."""
    overlap: ClassVar[int] = 0
    """Steps that are taken while an exchange is under way; less than `every`."""

    in_few_bits: ClassVar[bool] = True
    """Whether what it tells may be rounded: a sum or a mean may, one replica's own point may not."""
    needs_method: ClassVar[str] = ""
    """The name of the method that each replica must have; see `needs.py`."""
    needs_update: ClassVar[str] = ""
    """The name of an update that the base must have."""
    needs_momentum: ClassVar[bool] = False
    """Whether the base must have momentum."""
    needs_top_k: ClassVar[bool] = False
    """Whether an exchange must tell the largest parts alone."""

    def __post_init__(self) -> None:
        require_count("tau", self.tau)

    @property
    def every(self) -> int:
        """Steps from one exchange of anything to the next."""
        return self.tau // self.fragments

    def sent_vectors(self, replicas: int) -> float:
        """Of how many Vectors of what is exchanged a replica sends the bytes, on average. Here: of a mean, or a sum."""
        return 2 * (replicas - 1) / replicas

    def part(self, space: ParameterSpace, number: int) -> ParameterSpace:
        """The parameters that exchange `number` of the job is about, as a space: alike on all replicas."""
        return space

    def snapshot(self, space: ParameterSpace, state: dict[str, Any], number: int) -> dict[str, Any]:
        """What exchange `number` reads of this replica. No communication. Here: the state itself, as nothing changes
        while the exchange is under way."""
        return state

    @abstractmethod
    def exchange(self, replicas: Replicas, space: ParameterSpace, oracle: Oracle | None, state: dict[str, Any]) -> Any:
        """Hear of the others what `settle` needs (collective), of what `snapshot` gave. Changes nothing.

        `oracle` is None where this replica has no samples.
        """

    @abstractmethod
    def settle(self, heard: Any, space: ParameterSpace, state: dict[str, Any]) -> None:
        """Move this replica's weights, and keep in `state` what the next exchange needs. No communication."""

    def point(self, replicas: Replicas, space: ParameterSpace, state: State) -> Vector:
        """The model that the paper evaluates, on all replicas alike (collective), a Vector of its own. Here: the mean
        of all replicas, each counting alike."""
        return replicas.mean(space.weights, equal(replicas))


def equal(replicas: Replicas) -> list[float]:
    """Shares of the members that are all alike."""
    return [1 / len(replicas.members)] * len(replicas.members)


def by_samples(replicas: Replicas) -> list[float]:
    """Shares of the members by the samples on which they have trained since their last exchange."""
    total = sum(replicas.samples)
    return [samples / total for samples in replicas.samples] if total else equal(replicas)


def loss_of(report: StepReport, rule: str) -> float:
    """The step's loss. Raises UserError where there is none, in the name of a rule that goes by it."""
    if not math.isfinite(report.loss):
        raise UserError(
            f"rule of consensus {rule} goes by the replicas' losses, and this method's step has none "
            f"(loss={report.loss}); use another rule, such as easgd or mgrawa, or a method that takes a gradient or a "
            "loss at the weights."
        )
    return report.loss


def require_pull(value: object) -> None:
    """How far a replica goes towards what it is pulled to."""
    require_part("pull", value)


def require_part(name: str, value: object, because: str = "") -> None:
    """A number in [0, 1]."""
    part = isinstance(value, int | float) and 0 <= value <= 1
    require(part, name, value, f"a number >= 0 and <= 1{because}")
