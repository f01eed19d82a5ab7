"""What an update rule is: the step that is made of a gradient, where torch.optim has no class that can make it on
shards.

A class of torch.optim that works element by element needs none of this: it steps on shards as it is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from elastic_lsopt.oracle.method import State
from elastic_lsopt.space.geometry import ParameterSpace
from elastic_lsopt.space.vector import Vector


@dataclass(frozen=True)
class Rates:
    """What the param groups say now, a number for each parameter of the space, in the layout's order."""

    lr: tuple[float, ...]
    weight_decay: tuple[float, ...]


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

    def init(self, space: ParameterSpace) -> State:
        """What it remembers before its first step."""
        return {}

    @abstractmethod
    def update(self, space: ParameterSpace, gradient: Vector, state: State, rates: Rates) -> None:
        """Move `space.weights` in place; `gradient` (clipped) may be overwritten. Collective where it asks for sums."""
