"""One exchange: what a rule of consensus asks of the other replicas, over peers and in a format.

In few bits only differences travel, because a whole weight's rounding would be larger than a step. Points are told as
their differences from a reference that all members have alike: the last mean that they have formed together. What
rounding keeps back is added to what is told the next time (error feedback), so that nothing is lost, only late.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta

import torch
from torch import Tensor

from elastic_lsopt.backends.groups import Group
from elastic_lsopt.backends.peers.formats import AsTheyAre, Format
from elastic_lsopt.backends.peers.peers import Peers, Sum
from elastic_lsopt.backends.peers.unison import Unison
from elastic_lsopt.oracle.method import State
from elastic_lsopt.space.geometry import ParameterSpace
from elastic_lsopt.space.vector import Vector

LEFT, REFERENCE = "left", "reference"
"""In the state of the format: what rounding has kept back, and what all members have alike."""
EXACT = AsTheyAre()
ROUNDED = 0.1
"""Of the root mean square distance of the members: differences that rounding may have changed by more are not told."""
Shares = Sequence[float] | Sequence[Sequence[float]]
"""A number for each member, or for each member one for each parameter."""


class Exchange:
    """`Replicas` of one meeting. Nothing that it learns is kept, but for `told`.

    `kept` is what `told` gave after the last exchange; `inside` are this replica's ranks, in a group of their own.
    `gaps`: this replica's difference from the mean is wanted. Memory: a Vector while it travels; few bits keep two, a
    gap one.
    """

    def __init__(
        self, space: ParameterSpace, peers: Peers, form: Format, *, number: int, samples: tuple[int, ...], last: int,
        kept: State, inside: Group, gaps: bool = False,
    ) -> None:  # fmt: skip
        self.number, self.members, self.samples, self.last = number, peers.members, samples, last
        self.space, self._peers, self._form, self._kept = space, peers, form, kept
        self._first, self._together = inside.rank == 0, Unison(inside)
        self._left: Vector | None = None
        self._mean: Vector | None = None
        self._gram: Tensor | None = None
        self._gaps = gaps
        self.gap: Vector | None = None
        """This replica's difference from the mean of what all have told, up to its sign; None where it is not known."""

    def watch(self, timeout: timedelta) -> Callable[[], bool]:
        """From when on a member is gone; of each member's first rank, when it has heard all."""
        return self._peers.watch(timeout)

    @property
    def place(self) -> int:
        return self.members.index(self.number)

    def numbers(self, *own: float) -> Tensor:
        return self._said(torch.tensor(own, dtype=torch.float64))

    def mean(self, points: Vector, shares: Shares | None = None) -> Vector:
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
        return self._reduced(differences.clone(), None, self._form, keep, own=share)

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

    def differ(self, points: Vector) -> None:
        """Have this replica's difference from the mean told: by a reduction of its own where none has told it."""
        if self.gap is None:
            self._reduced(points.clone(), [1 / len(self.members)] * len(self.members), EXACT)

    @property
    def known_gram(self) -> Tensor | None:
        """What `gram` gives; None where no reduction has told it."""
        return self._gram

    def told(self) -> dict[str, Vector]:
        """What the format needs the next time, if all has gone well."""
        reference = {} if self._mean is None or self._form.exact else {REFERENCE: self._mean.clone()}
        return {**({} if self._left is None else {LEFT: self._left}), **reference}

    def _reduced(
        self, told: Vector, shares: Shares | None, form: Format, keep: float = 1.0, *, own: float = 1.0
    ) -> Vector:
        """The sum of all members' `told` times their shares (None: this one's is `own`); `told` is overwritten."""
        point = told.clone() if self._gaps and self.gap is None else None
        mine = own if shares is None else shares[self.place]
        told.mul_each_(mine) if isinstance(mine, Sequence) else told.mul_(mine)
        before: list[Tensor] = []
        if not form.exact and isinstance(left := self._left or self._kept.get(LEFT), Vector):
            told.add_(left, alpha=keep)
            before = self._peers.packed(left * keep)
        known, size, parts = self._of_pieces(shares), len(self.members), self._peers.packed(told)

        def reduce() -> tuple[list[Sum], Tensor]:
            sums, inner = self._peers.sums(parts, form, shares=known)
            return sums, torch.cat([inner.reshape(-1), self._rounded(sums, before)])

        sums, numbers = self._together.summed(reduce, (size * size + 1,))
        if not form.exact:
            self._left = self._peers.unpacked([s.left for s in sums if s.left is not None], self.space)
        total = self._peers.unpacked([s.value for s in sums], self.space)
        if not form.sparse and (known is None) == (shares is None):
            self._learn(numbers, min(mine) if isinstance(mine, Sequence) else mine, shares is None, point, total)
        return total

    def _rounded(self, sums: Sequence[Sum], before: Sequence[Tensor]) -> Tensor:
        """The square of what rounding has changed in this rank's own: what is kept back now, less what was before."""
        out = torch.zeros(1, dtype=torch.float64)
        for number, (one, bundle) in enumerate(zip(sums, self._peers.bundles, strict=True)):
            if one.left is not None:
                changed = one.left - before[number] if before else one.left
                out += changed.double().square().sum() / bundle.copies
        return out

    def _learn(self, numbers: Tensor, own: float, plain: bool, point: Vector | None, total: Vector) -> None:
        """Inner products of differences, and the gap, of what a reduction has summed: `plain`, of what was told.

        Where rounding may have changed the distances by more than ROUNDED, nothing is learnt.
        """
        size = len(self.members)
        known = numbers.new_zeros(2, size)
        known[:, self.place] = torch.stack([numbers[-1], numbers.new_tensor(own)])
        said = self._heard(
            lambda: self._peers.total(torch.cat([numbers[:-1], known.reshape(-1)])), numbers.numel() - 1 + known.numel()
        )
        gram, (changed, owns) = said[: size * size].view(size, size), said[size * size :].view(2, size)
        if not bool(owns.all()):
            return
        rounded = float((changed / owns.square()).sum())
        if plain:
            gram = centred(gram / owns / owns[:, None])
        if rounded > ROUNDED**2 * float(gram.trace()):
            return
        self._gram = gram
        if point is not None:
            self.gap = point.add_(total, alpha=-1 / float(owns.sum()) if plain else -1.0)

    def _of_pieces(self, shares: Shares | None) -> Tensor | None:
        """A row for each member: its share, or that of each piece's parameter; None where one of them is zero."""
        if shares is None:
            return None
        of_each = torch.tensor([s if isinstance(s, Sequence) else [s] for s in shares], dtype=torch.float64)
        if isinstance(shares[0], Sequence):
            of_each = of_each[:, [piece.parameter for piece in self.space.layout.pieces]]
        return of_each if bool(of_each.all()) else None

    def _said(self, own: Tensor) -> Tensor:
        """What the first rank of each member says, a row each, on all ranks."""
        flat = own.reshape(-1)
        return self._heard(lambda: self._peers.numbers(flat), len(self.members), flat.numel())

    def _heard(self, hear: Callable[[], Tensor], *shape: int) -> Tensor:
        """What this replica's first rank hears, on all of them."""

        def on_first() -> tuple[None, Tensor | None]:
            numbers = hear()
            return None, numbers if self._first else None

        return self._together.summed(on_first, shape)[1]


def centred(gram: Tensor) -> Tensor:
    """The inner products of vectors less their mean."""
    rows = gram.mean(0)
    return gram - rows - rows[:, None] + rows.mean()
