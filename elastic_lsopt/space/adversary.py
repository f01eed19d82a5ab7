"""A second adapter beside the trained one, whose product moves the weights against it: W + s B A + s B2 A2."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Adversary(Protocol):
    """The factors B2 and A2 of a model's layers: parameters of the space, and no part of the model that is wanted."""

    @property
    def factors(self) -> Sequence[bool]:
        """For each parameter of the space whether it is one of them."""
        ...

    @property
    def ranks(self) -> frozenset[int]:
        """Of its products."""
        ...

    def norm(self) -> float:
        """The length of all that it adds to the weights, sqrt(sum over layers ||s B2 A2||_F^2), the same number on
        every rank (collective: one gather of its factors, which are then whole on each rank; and r x r matrices)."""
        ...
