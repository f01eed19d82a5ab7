"""Micro-batches for this rank, step after step, from one cursor of committed samples.

    loader = StepLoader(dataset, collate, global_batch_size=32, microbatch_size=8, seed=0, rank=0, world=2,
                        total_samples=12800)
    for micro-batches in loader:                    # one optimizer step: list[MicroBatch]
        ...
        loader.commit(32)                   # the step has ended: its samples are used up

The cursor counts committed samples over all ranks, so it is the same number everywhere and says all there is to
save: a run that is killed and resumed reads on at the first sample that no finished step has used, at any world
size and with any batch. What iteration has read ahead is not in it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from elastic_lsopt.data.draws import CommonGenerator, Draws, drawing_alone, drawing_beside_others, trying
from elastic_lsopt.data.order import SampleOrder
from elastic_lsopt.data.read_ahead import ReadAhead
from elastic_lsopt.data.rewound_order import rewound
from elastic_lsopt.data.shards import ShardStream
from elastic_lsopt.errors import StaleGeneration, UserError
from elastic_lsopt.oracle.clock import BatchAt, steps_between
from elastic_lsopt.oracle.microbatch import MicroBatch, microbatches_of_rank, unit_sizes

log = logging.getLogger("elastic_lsopt")


class Dataset(Protocol):
    """Samples by number: whatever has a length and `[i]`."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Any: ...


class Shuffled:
    """A dataset as an endless run of samples, in the order of `SampleOrder`."""

    def __init__(self, dataset: Dataset, seed: int) -> None:
        self.dataset = dataset
        self.order = SampleOrder(len(dataset), seed)
        self.rewinds: tuple[int, ...] = ()
        """Cursors from which on the samples come in another order."""

    def read(self, first: int, count: int, draws: Draws | None = None) -> list[Any]:
        """The samples at positions first … first + count - 1; what each draws starts anew (None: it draws nothing)."""
        rows, ids = [], rewound(self.order, self.rewinds, range(first, first + count))
        for position, i in enumerate(ids.tolist(), first):
            if draws is not None:
                draws.start("sample", position // self.order.samples, i)
            rows.append(self.dataset[i])
        return rows

    def state_dict(self, committed: int) -> dict[str, Any]:
        """The dataset's size, the seed and the rewinds, without which a cursor means nothing."""
        rewinds = {"rewinds": list(self.rewinds)} if self.rewinds else {}
        return {"samples": self.order.samples, "seed": self.order.seed, **rewinds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raises UserError where the dataset's size or the seed is not the saved one."""
        for name, now in (("samples", self.order.samples), ("seed", self.order.seed)):
            if state_dict.get(name) != now:
                raise UserError(
                    f"the checkpoint was made with {name}={state_dict.get(name)} in the training set's order, but this "
                    f"job has {name}={now}; use the same data and seed, or start anew."
                )
        self.rewinds = tuple(state_dict.get("rewinds", ()))


class Source(Protocol):
    """Samples by their place in the order in which a loader gives them out."""

    @property
    def order(self) -> SampleOrder: ...
    def read(self, first: int, count: int, draws: Draws | None = None) -> list[Any]: ...
    def state_dict(self, committed: int) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


class StepLoader:
    """Iterates over the optimizer steps that are left, each a list of this rank's micro-batches of the global batch.

    `dataset` has samples by number, or is a `ShardStream` (whose own seed counts). `collate` makes the batch of a
    micro-batch from its list of samples. A thread prepares the next step while this one computes: see [Note: what
    samples draw]. `total_samples` is the length of the whole job: the last step takes what is left, cut into at least
    `parts` micro-batches (a rest of fewer samples than `parts` joins the step before it). `batch_at(position)` are the
    samples of the step that begins there, in whole micro-batches; None: always `global_batch_size`. It may change its
    mind until that step is given out: what was read ahead is then read anew. `microbatches` are this rank's of
    `global_batch_size` where a plan deals them unevenly; None, and for other batches: micro-batch u belongs to rank
    u mod world. A rank without a micro-batch gets micro-batch 0 of the step as an idle one. State is torchdata's
    protocol: state_dict, load_state_dict, __iter__, __len__.

    Raises UserError for an empty dataset or a batch smaller than one micro-batch. Memory: two steps of this rank's
    batches.

    [Note: what samples draw] A sample may draw random numbers, to crop or to mask. What it draws from the generators of
    torch, Python's `random` and numpy depends on (seed, epoch, sample) alone, in `collate` on the place of the
    micro-batch: the same at any world size and after a resume. Nobody else's numbers change by it. Only torch's
    generators can be had apart for a thread: a data set that draws from the others is read by the training thread, step
    by step. That is found out on the first step, where samples may be asked for twice. A generator that a data set
    holds itself (a torch.Generator, numpy's default_rng) is its own affair.
    """

    def __init__(
        self,
        dataset: Dataset | ShardStream,
        collate: Callable[[list[Any]], Any],
        *,
        global_batch_size: int,
        microbatch_size: int,
        seed: int,
        rank: int,
        world: int,
        total_samples: int,
        parts: int = 1,
        microbatches: Sequence[int] | None = None,
        batch_at: BatchAt | None = None,
    ) -> None:
        if not 0 <= rank < world:
            raise ValueError(f"rank={rank} must be between 0 and world-1={world - 1}.")
        self.source = self._source_of(dataset, seed)
        self.seed = self.source.order.seed
        self.collate = collate
        unit_sizes(global_batch_size, microbatch_size)  # which refuses a batch below one micro-batch
        self.global_batch_size = global_batch_size
        self.batch_at: BatchAt = batch_at or (lambda position: global_batch_size)
        self.microbatch_size = microbatch_size
        self.rank, self.world = rank, world
        self.total_samples, self.parts = total_samples, parts
        self.committed = 0
        self._own = microbatches
        self._reads_ahead = True
        self._loads = 0
        self._closed = False
        self.undone_steps = 0
        """Steps that this loader has given out and a rewind has taken back."""

    def _source_of(self, dataset: Dataset | ShardStream, seed: int) -> Source:
        return dataset if isinstance(dataset, ShardStream) else Shuffled(dataset, seed)

    @property
    def end(self) -> int:
        """The cursor at which there is no further step."""
        return self.total_samples

    def place(self, cursor: int) -> int:
        """Where in the job's order the sample at a cursor stands."""
        return cursor

    def __len__(self) -> int:
        """Steps of the whole job, those behind the cursor included, by the batches as they are planned now."""
        return steps_between(self.batch_at, 0, self.total_samples)

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        """From the cursor to the end of the job.

        Raises StaleGeneration at the first step that is asked of an iterator older than `load_state_dict` or `close`;
        what it has read ahead is dropped.
        """
        loads, position = self._loads, self.committed
        self._refuse_stale(loads)
        if position >= self.end:
            return
        with ReadAhead() as thread:
            microbatches = self._first(position)
            while True:
                position += self.samples_at(position)
                more = position < self.end
                expected = self.samples_at(position) if more else 0
                ahead = thread.submit(self._beside, position, expected) if more and self._reads_ahead else None
                undone = self.undone_steps
                yield microbatches
                self._refuse_stale(loads)
                if self.undone_steps != undone:  # what was read ahead is of the order that was left
                    if ahead is not None:
                        ahead.exception()
                    position, more, ahead = self.committed, self.committed < self.end, None
                if not more:
                    return
                if ahead is not None and self.samples_at(position) != expected:
                    ahead, _ = None, ahead.exception()  # the step that has ended has changed the batch
                microbatches = (ahead.result() if ahead is not None else None) or self.microbatches_at(position)

    def _first(self, position: int) -> list[MicroBatch]:
        """The micro-batches of an iterator's first step, which nobody could have read ahead; says whether others can
        be."""
        self._reads_ahead = True
        try:
            with trying(self.seed) as draws:
                return self._microbatches(position, self.samples_at(position), draws)
        except CommonGenerator as error:
            self._stop_reading_ahead(error)
            return self.microbatches_at(position)

    def _beside(self, position: int, samples: int) -> list[MicroBatch] | None:
        """The micro-batches of a later step, while another thread trains; None where they must be read by that one."""
        try:
            with drawing_beside_others(self.seed) as draws:
                return self._microbatches(position, samples, draws)
        except CommonGenerator as error:
            self._stop_reading_ahead(error)
            return None

    def _stop_reading_ahead(self, why: CommonGenerator) -> None:
        self._reads_ahead = False
        if self.rank == 0:
            log.warning(
                "no step is read ahead from now on: while samples were read, numbers were drawn from %s, which all "
                "threads share; let the data set draw by torch.rand and the like, or from a generator of its own.", why,
            )  # fmt: skip

    def samples_at(self, position: int) -> int:
        """Samples of the step that begins at `position`, over all ranks: the global batch, or what is left."""
        left, batch = self.end - position, self.batch_at(position)
        return left if left < batch + self.parts else batch

    def microbatches_at(self, position: int) -> list[MicroBatch]:
        """This rank's units of the global batch that begins at `position`; a pure function, it moves no cursor.

        While it runs no other thread may draw from a common generator.
        """
        with drawing_alone(self.seed) as draws:
            return self._microbatches(position, self.samples_at(position), draws)

    def _microbatches(self, position: int, samples: int, draws: Draws) -> list[MicroBatch]:
        last = position + samples >= self.end and samples != self.global_batch_size
        most = max(1, samples // self.parts) if last else self.microbatch_size
        sizes = unit_sizes(samples, min(self.microbatch_size, most))
        own = self._own if samples == self.global_batch_size else None
        mine = microbatches_of_rank(len(sizes), self.rank, self.world) if own is None else own
        return [self._unit(u, position, sizes, draws) for u in mine] or [
            self._unit(0, position, sizes, draws, idle=True)
        ]

    def _unit(self, index: int, position: int, sizes: Sequence[int], draws: Draws, idle: bool = False) -> MicroBatch:
        first = position + index * sizes[0]  # all micro-batches but the last are equally large
        rows = self.source.read(first, sizes[index], draws)
        draws.start("unit", self.place(first))
        return MicroBatch(index, self.collate(rows), idle)

    def _refuse_stale(self, loads: int) -> None:
        if self._closed:
            raise StaleGeneration("the loader was closed; take the new generation's.")
        if loads != self._loads:
            raise StaleGeneration("load_state_dict moved the loader; call iter(loader) again.")

    def commit(self, samples: int) -> None:
        """Count `samples` (>= 1, over all ranks) of a finished or skipped step as used."""
        if samples < 1:
            raise ValueError(f"commit({samples}): a step has at least 1 sample.")
        self.committed += samples

    @property
    def rewinds(self) -> int:
        """How often the job has gone back to an earlier state and on with another order of the samples."""
        return len(self.source.rewinds) if isinstance(self.source, Shuffled) else 0

    def rewind(self, state_dict: dict[str, Any], undone_steps: int) -> None:
        """Back by so many steps (>= 1) to a saved cursor, from which on the samples come in another order.

        Each still comes once per epoch. An iterator that is running goes on from there. For a data set with samples
        by number.
        """
        assert isinstance(self.source, Shuffled)
        until_now = self.source.rewinds
        self.source.load_state_dict(state_dict)
        self.committed = state_dict["committed"]
        self.source.rewinds = (*until_now, self.committed)
        self.undone_steps += undone_steps

    def state_dict(self) -> dict[str, Any]:
        """The committed cursor, and what the source needs to find its place again."""
        return {"committed": self.committed, **self.source.state_dict(self.committed)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Move the cursor; iterators that are running go stale.

        Raises UserError where the source is not the saved one: the same cursor would then repeat some samples and
        skip others.
        """
        if "ledger" in state_dict:
            raise UserError(
                "the checkpoint is of one of several replicas (consensus), whose samples are not all counted yet; go "
                "on with a consensus block, or start from the exported model."
            )
        self.source.load_state_dict(state_dict)
        self.begin_at(state_dict["committed"])

    def begin_at(self, cursor: int) -> None:
        """Move the cursor; iterators that are running go stale."""
        self.committed = cursor
        self._loads += 1

    def close(self) -> None:
        """End the loader: its iterators go stale, nothing that they have read ahead is given out."""
        self._closed = True
