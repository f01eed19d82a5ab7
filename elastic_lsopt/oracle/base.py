"""What a method may know of the base optimizer that steps with its gradient: momenta, rates, and nothing else."""

from __future__ import annotations

from typing import Literal, Protocol

from elastic_lsopt.space.vector import Vector

Need = Literal["momentum", "second_moment", "sgd"]
"""What a method cannot do without: a base that keeps it, or SGD."""


class Base(Protocol):
    """The base of this step, wherever it keeps its state. None communicates but `second_moment`, in one case."""

    def momentum(self) -> Vector:
        """Its mean of past gradients, live (read only); zeros where it has none yet."""
        ...

    def second_moment(self, after: Vector | None = None) -> Vector:
        """Its mean of past squares of the gradient, with the correction for its beginning: a Vector of its own.

        Of the steps so far; or as one more step makes it, with the gradient `after`, clipped as the step's would be
        (one all-reduce of a number where gradients are clipped and this one's norm is not known).
        """
        ...

    def rates(self) -> list[float]:
        """The learning rate of each of this rank's pieces."""
        ...

    def sgd_step(self, gradient: Vector) -> Vector:
        """What SGD would subtract with this gradient (momentum, Nesterov, decay and rate): a Vector of its own."""
        ...
