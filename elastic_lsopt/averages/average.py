"""What an average of the weights is: a state family that can say where the average lies."""

from __future__ import annotations

from abc import abstractmethod

from elastic_lsopt.oracle.family import Stateful
from elastic_lsopt.oracle.method import State
from elastic_lsopt.space.geometry import ParameterSpace
from elastic_lsopt.space.vector import Vector

FAMILY = "averages/"
"""Before the name of an average's family."""


class Average(Stateful):
    """Follows the weights by `after_step`; a frozen keyword-only dataclass whose fields are the hyper-parameters.

    It lives where the masters live, in their precision: 1/N of a Vector per rank, and no communication.
    """

    @abstractmethod
    def weights(self, space: ParameterSpace, state: State) -> Vector:
        """The averaged weights, live: read them, never write them."""
