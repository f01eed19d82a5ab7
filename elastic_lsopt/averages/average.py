"""What an average of the weights is: a state family that can say where the average lies."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from elastic_lsopt.averages.registry import averages
from elastic_lsopt.oracle.clock import SampleClock
from elastic_lsopt.oracle.family import Stateful
from elastic_lsopt.oracle.method import State
from elastic_lsopt.space.geometry import ParameterSpace
from elastic_lsopt.space.vector import Vector

FAMILY = "averages/"
"""Before the name of an average's family."""


@dataclass(frozen=True, kw_only=True)
class Average(Stateful, ABC):
    """Follows the weights by `after_step`; a frozen keyword-only dataclass whose fields are the hyper-parameters.

    It lives where the masters live, in their precision: 1/N of a Vector per rank, and no communication.
    """

    name: str = ""
    """By which it is evaluated and saved; empty: what its class is registered as. A YAML's key is its name."""

    @property
    def family(self) -> str:
        return FAMILY + (self.name or averages.name_of(type(self)))

    def first(self, clock: SampleClock) -> float:
        """The committed samples from which it takes weights. Raises UserError where that is a share of a run whose
        length is not known."""
        return 0.0

    def begun(self, state: State) -> bool:
        """Whether it has taken any weights; until then it is the weights themselves."""
        return True

    @abstractmethod
    def weights(self, space: ParameterSpace, state: State) -> Vector:
        """The averaged weights, live: read them, never write them."""
