"""The unit of work: a fixed number of samples with a global index, given whole to ranks.

    units of a step   0 1 2 3 | 4 5 6 7          sizes (8, 8, 8, 6): the last may be smaller
    parts (m = 2)     part 0  | part 1           cut by unit index, never by rank
    rank of unit u    u mod world                so every part is spread over all ranks

Every rank of a shard group runs equally many forwards, because each forward gathers weights together. Where the
units do not divide evenly, a rank fills its missing slot with an *idle* unit: a real batch of this step whose loss is
selected out (never multiplied: 0 x NaN is NaN). So any world size computes the same sums, also 7 workers on 16 units.
Where every rank holds all weights nobody waits in a forward, and a plan may deal the units otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from elastic_lsopt.errors import UserError


@dataclass(frozen=True)
class Unit:
    """One micro-batch of this rank: `index` is its place in the step's global order, `batch` what the loss takes."""

    index: int
    batch: Any
    idle: bool = False


def unit_sizes(global_batch_size: int, unit_size: int) -> tuple[int, ...]:
    """Cut a global batch into units of `unit_size` samples; the last takes what is left.

    Raises UserError where the batch is smaller than one unit.
    """
    if not 1 <= unit_size <= global_batch_size:
        raise UserError(
            f"per_device_train_batch_size={unit_size} must be between 1 and global_batch_size={global_batch_size}; "
            f"lower it, or raise global_batch_size to at least {unit_size}."
        )
    full, rest = divmod(global_batch_size, unit_size)
    return (unit_size,) * full + ((rest,) if rest else ())


def part_bounds(units: int, parts: int) -> tuple[tuple[int, int], ...]:
    """First and last-plus-one unit of each part: as equal as whole units allow, in order of index.

    Raises UserError where there are fewer units than parts.
    """
    if not 1 <= parts <= units:
        raise UserError(
            f"a step of {units} unit(s) cannot be cut into {parts} part(s): use at least {parts} units a step "
            "(a larger global_batch_size or a smaller per_device_train_batch_size), or fewer parts."
        )
    return tuple((units * p // parts, units * (p + 1) // parts) for p in range(parts))


def units_of_rank(units: int, rank: int, world: int) -> range:
    """The global indices that a rank holds: rank, rank + world, rank + 2 world …"""
    return range(rank, units, world)


def slots(bounds: tuple[int, int], rank: int, world: int) -> list[int | None]:
    """This rank's forwards for one part, as unit indices; None is an idle slot. As many on every rank."""
    first, end = bounds
    mine = range(first + (rank - first) % world, end, world)
    most = -(-(end - first) // world)  # consecutive units, dealt out one by one
    return [*mine, *([None] * (most - len(mine)))]


def as_units(microbatches: Sequence[Any], rank: int, world: int) -> list[Unit]:
    """Give a rank's plain list of micro-batches its global indices: the j-th of rank r is unit j * world + r."""
    return [m if isinstance(m, Unit) else Unit(j * world + rank, m) for j, m in enumerate(microbatches)]
