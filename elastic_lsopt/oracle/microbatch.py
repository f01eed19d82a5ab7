"""The micro-batch: a fixed number of samples with a global index, given whole to ranks.

    micro-batches of a step   0 1 2 3 | 4 5 6 7          sizes (8, 8, 8, 6): the last may be smaller
    parts (m = 2)     part 0  | part 1           cut by micro-batch index, never by rank
    rank of micro-batch u    u mod world                so every part is spread over all ranks

Every rank of a shard group runs equally many forwards, because each forward gathers weights together. Where the
micro-batches do not divide evenly, a rank fills its missing slot with an *idle* micro-batch: a real batch of this step
whose loss is selected out (never multiplied: 0 x NaN is NaN). So any world size computes the same sums, also 7 workers
on 16 micro-batches. Where every rank holds all weights nobody waits in a forward, and a plan may deal the micro-batches
otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from elastic_lsopt.errors import UserError


@dataclass(frozen=True)
class MicroBatch:
    """One micro-batch of this rank: `index` is its number in the job's step, `batch` what the loss takes.

    Where the job has several replicas, `place` is its number among those of this rank's replica (None: the index).
    """

    index: int
    batch: Any
    idle: bool = False
    place: int | None = None

    @property
    def at(self) -> int:
        """By which it is dealt to a rank of the replica and to a part."""
        return self.index if self.place is None else self.place


def unit_sizes(global_batch_size: int, microbatch_size: int) -> tuple[int, ...]:
    """Cut a global batch into micro-batches of `microbatch_size` samples; the last takes what is left.

        >>> unit_sizes(30, 8)
        (8, 8, 8, 6)

    Raises UserError where the batch is smaller than one micro-batch.
    """
    if not 1 <= microbatch_size <= global_batch_size:
        raise UserError(
            f"per_device_train_batch_size={microbatch_size} must be between 1 and "
            f"global_batch_size={global_batch_size}; lower it, or raise the batch to at least {microbatch_size}."
        )
    full, rest = divmod(global_batch_size, microbatch_size)
    return (microbatch_size,) * full + ((rest,) if rest else ())


def part_bounds(microbatches: int, parts: int) -> tuple[tuple[int, int], ...]:
    """First and last-plus-one micro-batch of each part: as equal as whole micro-batches allow, in order of index.

        >>> part_bounds(7, parts=2)
        ((0, 3), (3, 7))

    Raises UserError where there are fewer micro-batches than parts.
    """
    if not 1 <= parts <= microbatches:
        raise UserError(
            f"a step of {microbatches} micro-batch(es) cannot be cut into {parts} part(s): use at least {parts} "
            "micro-batches a step (a larger global_batch_size or smaller per_device_train_batch_size), or fewer parts."
        )
    return tuple((microbatches * p // parts, microbatches * (p + 1) // parts) for p in range(parts))


def microbatches_of_rank(microbatches: int, rank: int, world: int) -> range:
    """The global indices that a rank holds: rank, rank + world, rank + 2 world …

    >>> [*microbatches_of_rank(8, rank=1, world=3)]
    [1, 4, 7]
    """
    return range(rank, microbatches, world)


def slots(bounds: tuple[int, int], rank: int, world: int) -> list[int | None]:
    """This rank's forwards for one part, as micro-batch indices; None is an idle slot. As many on every rank."""
    first, end = bounds
    mine = range(first + (rank - first) % world, end, world)
    most = -(-(end - first) // world)  # consecutive micro-batches, dealt out one by one
    return [*mine, *([None] * (most - len(mine)))]


def as_microbatches(
    microbatches: Sequence[Any], rank: int, world: int, replica: int = 0, replicas: int = 1
) -> list[MicroBatch]:
    """Give a rank's list of micro-batches their numbers: the j-th of rank r is at j * world + r in its replica.

    A plain batch gets an index of its own in the job, of which other replicas make no use.
    """
    out = []
    for j, given in enumerate(microbatches):
        at = j * world + rank
        m = given if isinstance(given, MicroBatch) else MicroBatch(at * replicas + replica, given)
        out.append(replace(m, place=at) if replicas > 1 and m.place is None and not m.idle else m)
    return out
