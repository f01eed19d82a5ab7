"""The other replicas, as a rule of consensus sees them: their numbers, means of their Vectors, a Vector of one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor

from elastic_lsopt.space.vector import Vector


class Replicas(Protocol):
    """Those who meet at one exchange. All methods are collective among them, in the same order on all.

    Nothing that they return has taken effect anywhere: a rule keeps it for `settle`, which runs on all or on none.
    """

    number: int
    """This replica's own."""
    members: tuple[int, ...]
    """Who takes part, in ascending order."""
    samples: tuple[int, ...]
    """On how many each member has trained since its last exchange."""
    last: int
    """The number of this exchange in the job, from 0."""

    @property
    def place(self) -> int:
        """This replica's place among the members."""
        ...

    def numbers(self, *own: float) -> Tensor:
        """What each member says, a row each (fp64, on the host); one message of a few bytes."""
        ...

    def mean(self, points: Vector, shares: Sequence[float] | Sequence[Sequence[float]] | None = None) -> Vector:
        """The mean of all members' points, a Vector of its own: one reduction of a Vector.

        `shares`, alike on all, is a number for each member, or for each member one for each parameter; they sum to 1
        over the members. None: by `samples`.
        """
        ...

    def sum(self, differences: Vector, share: float = 1.0, *, keep: float = 1.0) -> Vector:
        """The sum of each member's differences times its `share`: one reduction of a Vector.

        `keep`: how much is told of what rounding has kept back before.
        """
        ...

    def of(self, points: Vector, leader: int, among: Sequence[int] | None = None) -> Vector:
        """The leader's points: one broadcast of a Vector. `among`: to these members, who have named the same leader,
        while others may have one of their own."""
        ...

    def swapped(self, points: Vector, neighbours: Sequence[int]) -> Mapping[int, Vector]:
        """The neighbours' points, by member: as many messages of a Vector each way. Neighbours are mutual."""
        ...

    def gram(self, points: Vector) -> Tensor:
        """Inner products of all members' differences from their mean of equal shares, (M, M) fp64, on the host.

        After `mean` of the same points in the same exchange: R x R numbers; else a reduction of its own.
        """
        ...
