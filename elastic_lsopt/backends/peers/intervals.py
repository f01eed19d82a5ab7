"""Which elements of the vector a rank shares with whom in the other replicas.

Every parameter is cut at the borders of all pieces of all replicas. Then each stretch lies whole at one rank of each
replica, and stretches with the same holders travel together, as one bundle:

    replica 0, two ranks    [ a ............ | b ........ ]
    replica 1, one rank     [ c ......................... ]
    bundles                 (a, c)             (b, c)

Replicas of unequal size need no special case: replicas that are cut alike have one bundle per rank, others at most as
many as there are ranks in all. Where several ranks of a replica hold the same elements (DDP, HSDP), the k-th of them
belongs with the k-th of the other replicas. Names and offsets decide, never slots: padding is shared with nobody.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from elastic_lsopt.space.layout import Layout

Cut = Sequence[tuple[int, int, int]]
"""The pieces of a rank: (parameter, offset, length)."""
Seat = tuple[int, int]
"""(replica, rank in it)."""


@dataclass(frozen=True)
class Stretch:
    """Elements [begin, end) of this rank's piece number `piece`."""

    piece: int
    begin: int
    end: int


@dataclass(frozen=True)
class Bundle:
    """What this rank shares with these ranks, one of each member in ascending order, in an order that all have."""

    holders: tuple[Seat, ...]
    stretches: tuple[Stretch, ...]
    copies: int
    """How many bundles there are of these elements: more than one where several ranks of a replica hold them."""

    @property
    def numel(self) -> int:
        return sum(s.end - s.begin for s in self.stretches)


def cut_of(layout: Layout) -> list[tuple[int, int, int]]:
    """What the others must know of a rank's layout."""
    return [(p.parameter, p.offset, p.length) for p in layout.pieces]


def bundles(mine: Seat, cuts: Mapping[Seat, Cut], members: Sequence[int]) -> tuple[Bundle, ...]:
    """The bundles of the rank at `mine`, by their holders; `cuts` are those of all ranks of all members.

    Raises ValueError where a member does not hold an element that another has: they train other parameters.
    """
    borders = _borders(cuts, members)
    holders = _Holders(cuts, members)
    out: dict[tuple[tuple[Seat, ...], int], list[tuple[int, int, Stretch]]] = {}
    for number, (parameter, offset, length) in enumerate(cuts[mine]):
        at = borders[parameter]
        inside = at[bisect_right(at, offset) : bisect_left(at, offset + length)]
        for begin, end in zip([offset, *inside], [*inside, offset + length], strict=True):
            all_of_them = holders.of(parameter, begin, end)
            for who in all_of_them:
                if mine in who:
                    stretch = Stretch(number, begin - offset, end - offset)
                    out.setdefault((who, len(all_of_them)), []).append((parameter, begin, stretch))
    return tuple(
        Bundle(who, tuple(stretch for _, _, stretch in sorted(found, key=lambda each: each[:2])), copies)
        for (who, copies), found in sorted(out.items())
    )


def _borders(cuts: Mapping[Seat, Cut], members: Sequence[int]) -> dict[int, list[int]]:
    """Where each parameter is cut by anybody, in ascending order."""
    found: dict[int, set[int]] = {}
    for (replica, _), cut in cuts.items():
        if replica in members:
            for parameter, offset, length in cut:
                found.setdefault(parameter, set()).update((offset, offset + length))
    return {parameter: sorted(at) for parameter, at in found.items()}


class _Holders:
    """Who holds a stretch: for each k the k-th holder of every member."""

    def __init__(self, cuts: Mapping[Seat, Cut], members: Sequence[int]) -> None:
        self._members = members
        self._runs: dict[tuple[int, int], list[tuple[int, int, int]]] = {}
        for (replica, rank), cut in sorted(cuts.items()):
            for parameter, offset, length in cut:
                self._runs.setdefault((replica, parameter), []).append((offset, offset + length, rank))

    def of(self, parameter: int, begin: int, end: int) -> list[tuple[Seat, ...]]:
        each = []
        for replica in self._members:
            ranks = [r for a, b, r in self._runs.get((replica, parameter), ()) if a <= begin and end <= b]
            if not ranks:
                raise ValueError(f"replica {replica} has no elements {begin} to {end} of parameter {parameter}")
            each.append([(replica, rank) for rank in ranks])
        return [tuple(own[k % len(own)] for own in each) for k in range(max(map(len, each)))]
