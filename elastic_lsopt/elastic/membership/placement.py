"""Which worker is of which replica: a function of where the workers were, who is there now, and nothing else.

    before   0: a1 a2    1: b1 b2            b's node is lost, c comes with two workers
    after    0: a1 a2    1: c1 c2

Who stays stays where he is. Newcomers go where the fewest are, so a vacant replica is filled first; the newcomers of a
node go together, and to their own node's workers, where all sizes come out as even as they do otherwise. With fewer
workers than replicas some are vacant.

[Note: moving] A worker that changes its replica leaves its state behind, and both replicas form anew. So nobody is
moved while sizes differ by one at most, and then as few as possible: the last ones of the largest. Nor is anybody moved
when somebody has died: his node starts another worker within seconds, and that one fills the gap.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

EVEN = 1
"""By so many workers replicas may differ for good."""


@dataclass(frozen=True)
class Replica:
    """One replica's workers, in the order of the job's ranks; none: it is vacant.

    `since` is the generation that formed them. A group of workers is named by its replica's number and this: as long as
    both stay, nothing has changed for these workers, whatever becomes of the others.
    """

    workers: tuple[str, ...] = ()
    since: int = 0


def vacant(replicas: int) -> tuple[Replica, ...]:
    """Of a job that nobody has joined; () where it has one replica, of which nothing need be told."""
    return (Replica(),) * replicas if replicas > 1 else ()


def uneven(replicas: Sequence[Replica]) -> bool:
    """Whether a worker should move, once nobody is expected any more."""
    sizes = [len(r.workers) for r in replicas]
    return bool(sizes) and max(sizes) - min(sizes) > EVEN


def after(
    before: Sequence[Replica], nodes: Iterable[Sequence[str]], number: int, *, move: bool, anew: Iterable[int] = ()
) -> tuple[Replica, ...]:
    """The replicas of generation `number`, whose workers are those of `nodes`, node by node.

    `move`: workers may change their replica. Replicas in `anew` form anew also where nobody came or went. O(workers).
    """
    placed = place([r.workers for r in before], nodes, move=move)
    return tuple(
        replace(old, workers=workers, since=number) if workers != old.workers or k in anew else old
        for k, (old, workers) in enumerate(zip(before, placed, strict=True))
    )


def place(
    before: Sequence[Sequence[str]], nodes: Iterable[Sequence[str]], *, move: bool
) -> tuple[tuple[str, ...], ...]:
    """The workers of each replica, in the order of `nodes`; see [Note: moving] for `move`."""
    nodes = [tuple(workers) for workers in nodes]
    node_of = {worker: number for number, workers in enumerate(nodes) for worker in workers}
    ranks = {worker: rank for rank, worker in enumerate(node_of)}
    out = [[w for w in workers if w in ranks] for workers in before]
    known = {w for workers in out for w in workers}
    _seat(out, [[w for w in workers if w not in known] for workers in nodes], node_of)
    if move:
        _even_out(out, ranks)
    return tuple(tuple(sorted(workers, key=ranks.__getitem__)) for workers in out)


def _seat(out: list[list[str]], newcomers: Sequence[Sequence[str]], node_of: dict[str, int]) -> None:
    """Newcomers, by node, into `out`: up to one level everywhere, and the rest one each where it suits them."""
    sizes = [len(workers) for workers in out]
    level, rest = _level(sizes, sum(map(len, newcomers)))
    seats = [max(0, level - size) for size in sizes]
    further = [size <= level for size in sizes]
    home = [dict[int, int]() for _ in out]
    """For each replica, how many of its workers are on a node."""
    for k, workers in enumerate(out):
        for worker in workers:
            home[k][node_of[worker]] = home[k].get(node_of[worker], 0) + 1

    def room(k: int) -> int:
        return seats[k] + (1 if rest and further[k] else 0)

    for group in sorted(newcomers, key=len, reverse=True):  # the largest find room first; sorting keeps their order
        left = list(group)
        while left:
            node = node_of[left[0]]
            fits = [k for k in range(len(out)) if room(k) >= len(left)]
            if fits:
                k = min(fits, key=lambda k: (-home[k].get(node, 0), room(k), k))
            else:
                k = min(range(len(out)), key=lambda k: (-min(room(k), 1) * home[k].get(node, 0), -room(k), k))
            taken = min(len(left), room(k))
            if taken > seats[k]:
                rest, further[k] = rest - 1, False
            seats[k] = max(0, seats[k] - taken)
            out[k] += left[:taken]
            home[k][node] = home[k].get(node, 0) + taken
            del left[:taken]


def _level(sizes: Sequence[int], newcomers: int) -> tuple[int, int]:
    """To which size newcomers fill the smaller replicas up, and how many are left then, for one each."""
    ordered = sorted(sizes)
    level, filled, left = ordered[0], 0, newcomers
    while True:
        while filled < len(ordered) and ordered[filled] <= level:
            filled += 1
        if left < filled:
            return level, left
        top = ordered[filled] if filled < len(ordered) else level + left
        rise = max(1, min(top - level, left // filled))
        level, left = level + rise, left - rise * filled


def _even_out(out: list[list[str]], ranks: dict[str, int]) -> None:
    while True:
        largest = max(range(len(out)), key=lambda k: (len(out[k]), k))
        smallest = min(range(len(out)), key=lambda k: (len(out[k]), k))
        if len(out[largest]) - len(out[smallest]) <= EVEN:
            return
        worker = max(out[largest], key=ranks.__getitem__)
        out[largest].remove(worker)
        out[smallest].append(worker)
