"""Units of work for this rank, step after step, from one cursor of committed samples.

    loader = StepLoader(dataset, collate, global_batch_size=32, unit_size=8, seed=0, rank=0, world=2, steps=400)
    for units in loader:                    # one optimizer step: list[Unit]
        ...
        loader.commit(32)                   # the step has ended: its samples are used up

The cursor counts committed samples over all ranks, so it is the same number everywhere and says all there is to
save: a run that is killed and resumed reads on at the first sample that no finished step has used, at any world
size. What iteration has read ahead is not in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

from elastic_lsopt.elastic.order import SampleOrder
from elastic_lsopt.errors import StaleGeneration, UserError
from elastic_lsopt.oracle.units import Unit, unit_sizes, units_of_rank


class Dataset(Protocol):
    """Samples by number: whatever has a length and `[i]`."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Any: ...


class StepLoader:
    """Iterates over the optimizer steps that are left, each a list of this rank's units of the global batch.

    `collate` makes the batch of a unit from its list of samples; it must be a pure function (a thread prepares the
    next step while this one computes). `steps` is the length of the whole job, so iteration ends once
    steps * global_batch_size samples are read. A rank without a unit in a small batch gets unit 0 as an idle one.
    State is torchdata's protocol: state_dict, load_state_dict, __iter__, __len__.

    Raises UserError for an empty dataset or a batch smaller than one unit. Memory: two steps of this rank's batches.
    """

    def __init__(
        self,
        dataset: Dataset,
        collate: Callable[[list[Any]], Any],
        *,
        global_batch_size: int,
        unit_size: int,
        seed: int,
        rank: int,
        world: int,
        steps: int,
    ) -> None:
        if not 0 <= rank < world:
            raise ValueError(f"rank={rank} must be between 0 and world-1={world - 1}.")
        self.dataset = dataset
        self.collate = collate
        self.order = SampleOrder(len(dataset), seed)
        self.sizes = unit_sizes(global_batch_size, unit_size)
        self.global_batch_size = global_batch_size
        self.unit_size = unit_size
        self.rank, self.world, self.steps = rank, world, steps
        self.committed = 0
        self._loads = 0

    def __len__(self) -> int:
        """Steps of the whole job, those behind the cursor included."""
        return self.steps

    def __iter__(self) -> Iterator[list[Unit]]:
        """From the cursor to the end of the job.

        Raises StaleGeneration at the first step that is asked of an iterator older than `load_state_dict`.
        """
        loads, position = self._loads, self.committed
        end = self.steps * self.global_batch_size
        if position >= end:
            return
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="step-loader") as thread:
            ahead = thread.submit(self.units_at, position)
            while position < end:
                units = ahead.result()
                position += self.global_batch_size
                if position < end:
                    ahead = thread.submit(self.units_at, position)
                yield units
                if loads != self._loads:
                    raise StaleGeneration("load_state_dict moved the loader; call iter(loader) again.")

    def units_at(self, position: int) -> list[Unit]:
        """This rank's units of the global batch that begins at `position`; a pure function, it moves nothing."""
        mine = units_of_rank(len(self.sizes), self.rank, self.world)
        return [self._unit(u, position) for u in mine] or [self._unit(0, position, idle=True)]

    def _unit(self, index: int, position: int, idle: bool = False) -> Unit:
        first = position + index * self.unit_size
        ids = self.order.at(range(first, first + self.sizes[index]))
        return Unit(index, self.collate([self.dataset[i] for i in ids.tolist()]), idle)

    def commit(self, samples: int) -> None:
        """Count `samples` (>= 1, over all ranks) of a finished or skipped step as used."""
        if samples < 1:
            raise ValueError(f"commit({samples}): a step has at least 1 sample.")
        self.committed += samples

    def state_dict(self) -> dict[str, int]:
        """The committed cursor, and the dataset's size and the seed, without which it means nothing."""
        return {"committed": self.committed, "samples": self.order.samples, "seed": self.order.seed}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Move the cursor; iterators that are running go stale.

        Raises UserError where the dataset's size or the seed is not the saved one: the same cursor would then
        repeat some samples and skip others.
        """
        for name, now in (("samples", self.order.samples), ("seed", self.order.seed)):
            if state_dict[name] != now:
                raise UserError(
                    f"the checkpoint was made with {name}={state_dict[name]} in the training set's order, but this "
                    f"job has {name}={now}; use the same data and seed, or start anew."
                )
        self.committed = state_dict["committed"]
        self._loads += 1
