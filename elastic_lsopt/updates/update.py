"""What an update rule is: the step that is made of a gradient, where torch.optim has no class that can make it on
shards.

A class of torch.optim that works element by element needs none of this: it steps on shards as it is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from elastic_lsopt.oracle.method import State
from elastic_lsopt.oracle.observation import Seen, Sees, Where
from elastic_lsopt.space.geometry import ParameterSpace
from elastic_lsopt.space.vector import Vector


@dataclass(frozen=True)
class Rates:
    """What the param groups say now, a number for each parameter of the space, in the layout's order."""

    lr: tuple[float, ...]
    weight_decay: tuple[float, ...]
    alone: frozenset[int] = frozenset()
    """Parameters that got no gradient and stay as they are, what is remembered of them too. Only a rule that works on
    all its parameters together is told of them; others are not given them."""


class Update(ABC):
    """A frozen keyword-only dataclass whose fields are the hyper-parameters beside lr and weight decay.

    Fields become entries of the param groups, so that a schedule or a rule of batch scaling can move them.
    """

    decoupled_weight_decay: ClassVar[bool] = False
    """Whether decay shrinks the weights by rate times decay itself: then batch scaling keeps the decay per sample."""

    first_moment: ClassVar[str] = ""
    """The name in its state of a mean of past gradients, for methods that look at one; empty: it keeps none."""
    second_moment: ClassVar[str] = ""
    """The name in its state of a mean of their squares, debiased by 1 - betas[1]^step."""
    together: ClassVar[bool] = False
    """Whether all its parameters must have the same hyper-parameters (beside rate and decay)."""
    sees: ClassVar[Sees] = "nothing"
    """What it looks at beside the gradient; see `oracle/observation.py`."""
    where: ClassVar[Where] = "weights"
    """Where it looks: at the weights before the method's first pass, or where the last pass of the method begins."""

    def sees_at(self, step: int) -> bool:
        """Whether it looks in this step; it does in any case where a parameter has not been seen before."""
        return True

    def observe(self, space: ParameterSpace, seen: Seen, state: State) -> None:  # noqa: B027
        """Remember what was seen of these parameters, before the step's `update`; `seen/<parameter>` counts.

        An update that sees more than the gradient and has none of its own is refused when it is made.
        """

    def init(self, space: ParameterSpace) -> State:
        """What it remembers before its first step."""
        return {}

    def point(self, space: ParameterSpace, state: State) -> Vector | None:
        """Where the model is evaluated and exported, a Vector of its own; None: at the weights."""
        return None

    @abstractmethod
    def update(self, space: ParameterSpace, gradient: Vector, state: State, rates: Rates) -> None:
        """Move `space.weights` in place; `gradient` (clipped) may be overwritten. Collective where it asks for sums."""


def numbers(space: ParameterSpace, state: dict[str, Any], key: str, first: float) -> list[float]:
    """The number `key` of each parameter in an update's state; `first` for one that has none yet.

    One of its own for each parameter, because parameters that are unfrozen later begin later, and because groups that
    differ in hyper-parameters are stepped one after the other.
    """
    return [state.get(f"{key}/{p.name}", first) for p in space.layout.parameters]


def keep_numbers(space: ParameterSpace, state: dict[str, Any], key: str, values: Sequence[float]) -> None:
    """Set it for each parameter."""
    state.update({f"{key}/{p.name}": value for p, value in zip(space.layout.parameters, values, strict=True)})


def count_steps(space: ParameterSpace, state: dict[str, Any]) -> list[int]:
    """How many steps each parameter has taken with this update, the one that begins included.

    A count of all parameters together, as earlier checkpoints of some updates have it, is each one's.
    """
    steps = [int(before) + 1 for before in numbers(space, state, "step", state.pop("step", 0))]
    keep_numbers(space, state, "step", steps)
    return steps
