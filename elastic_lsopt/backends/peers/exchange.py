"""One exchange: what a rule of consensus asks of the other replicas, over peers and in a format.

In few bits only differences travel, because a whole weight's rounding would be larger than a step. Points are told as
their differences from a reference that all members have alike: the last mean that they have formed together. What
rounding keeps back is added to what is told the next time (error feedback), so that nothing is lost, only late.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta

import torch
from torch import Tensor

from elastic_lsopt.backends.groups import Group
from elastic_lsopt.backends.peers.formats import AsTheyAre, Format
from elastic_lsopt.backends.peers.peers import Peers
from elastic_lsopt.backends.peers.unison import Unison
from elastic_lsopt.oracle.method import State
from elastic_lsopt.space.geometry import ParameterSpace
from elastic_lsopt.space.vector import Vector

LEFT, REFERENCE = "left", "reference"
"""In the state of the format: what rounding has kept back, and what all members have alike."""
EXACT = AsTheyAre()


class Exchange:
    """`Replicas` of one meeting. Nothing that it learns is kept, but for `told`.

    `kept` is what `told` gave after the last exchange; `inside` are this replica's ranks, in a group of their own.
    Memory: a Vector while it travels; few bits keep two.
    """

    def __init__(
        self, space: ParameterSpace, peers: Peers, form: Format, *, number: int, samples: tuple[int, ...], last: int,
        kept: State, inside: Group,
    ) -> None:  # fmt: skip
        self.number, self.members, self.samples, self.last = number, peers.members, samples, last
        self.space, self._peers, self._form, self._kept = space, peers, form, kept
        self._first, self._together = inside.rank == 0, Unison(inside)
        self._left: Vector | None = None
        self._mean: Vector | None = None
        self._gram: Tensor | None = None

    def watch(self, timeout: timedelta) -> Callable[[], bool]:
        """From when on a member is gone; of each member's first rank, when it has heard all."""
        return self._peers.watch(timeout)

    @property
    def place(self) -> int:
        return self.members.index(self.number)

    def numbers(self, *own: float) -> Tensor:
        return self._said(torch.tensor(own, dtype=torch.float64))

    def mean(self, points: Vector, shares: Sequence[float] | Sequence[Sequence[float]] | None = None) -> Vector:
        if shares is None:
            total = sum(self.samples)
            shares = [s / total if total else 1 / len(self.members) for s in self.samples]
        reference = self._kept.get(REFERENCE)
        if self._form.exact or not isinstance(reference, Vector):
            mean = self._reduced(points.clone(), shares, EXACT)
        else:
            mean = self._reduced(points - reference, shares, self._form).add_(reference)
        self._mean = mean
        return mean

    def sum(self, differences: Vector, share: float = 1.0, *, keep: float = 1.0) -> Vector:
        return self._reduced(differences.clone(), [share] * len(self.members), self._form, keep)

    def of(self, points: Vector, leader: int, among: Sequence[int] | None = None) -> Vector:
        parts, place = self._peers.packed(points), self.members.index(leader)
        if among is None or len(among) == len(self.members):
            heard = self._together(lambda: self._peers.from_leader(parts, place))
        else:
            others = [self.members.index(m) for m in among if m != leader]
            heard = self._together(lambda: self._peers.handed_on(parts, place, others))
        return self._peers.unpacked(heard, self.space)

    def swapped(self, points: Vector, neighbours: Sequence[int]) -> Mapping[int, Vector]:
        parts, places = self._peers.packed(points), [self.members.index(n) for n in neighbours]
        found = self._together(lambda: self._peers.swapped(parts, places))
        return {n: self._peers.unpacked(parts, self.space) for n, parts in zip(neighbours, found, strict=True)}

    def gram(self, points: Vector) -> Tensor:
        if self._gram is None:
            self._reduced(points.clone(), [1 / len(self.members)] * len(self.members), EXACT)
        assert self._gram is not None
        return self._gram

    @property
    def apart(self) -> float | None:
        """Root mean square distance of the members from their mean; None where no reduction has told it."""
        return None if self._gram is None else math.sqrt(max(0.0, float(self._gram.trace())) / len(self.members))

    def told(self) -> dict[str, Vector]:
        """What the format needs the next time, if all has gone well."""
        reference = {} if self._mean is None or self._form.exact else {REFERENCE: self._mean.clone()}
        return {**({} if self._left is None else {LEFT: self._left}), **reference}

    def _reduced(
        self, told: Vector, shares: Sequence[float] | Sequence[Sequence[float]], form: Format, keep: float = 1.0
    ) -> Vector:
        """The sum of all members' `told` times their shares; `told` is overwritten."""
        own = shares[self.place]
        told.mul_each_(own) if isinstance(own, Sequence) else told.mul_(own)
        if not form.exact and isinstance(left := self._left or self._kept.get(LEFT), Vector):
            told.add_(left, alpha=keep)
        of_each = [s for s in shares if not isinstance(s, Sequence)]
        told_whole = len(of_each) == len(shares) and all(of_each) and not form.sparse
        known, size, parts = of_each if told_whole else None, len(self.members), self._peers.packed(told)
        sums, inner = self._together.summed(lambda: self._peers.sums(parts, form, shares=known), (size, size))
        if known is not None:
            self._gram = self._said(inner).sum(0).view_as(inner)
        if not form.exact:
            self._left = self._peers.unpacked([s.left for s in sums if s.left is not None], self.space)
        return self._peers.unpacked([s.value for s in sums], self.space)

    def _said(self, own: Tensor) -> Tensor:
        """What the first rank of each member says, a row each, on all ranks."""
        flat = own.reshape(-1)

        def hear() -> tuple[None, Tensor | None]:
            rows = self._peers.numbers(flat)
            return None, rows if self._first else None

        return self._together.summed(hear, (len(self.members), flat.numel()))[1]
