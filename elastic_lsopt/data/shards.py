"""Samples that come in shards, one after the other: files, tars, record streams, whatever can only be iterated.

    stream = ShardStream(["a.jsonl", "b.jsonl"], open_lines, seed=0)
    loader = StepLoader(stream, collate, …)                     # as with any dataset

    epoch 0   b: 0 1 2 | a: 3 4 5 6     shards permuted anew each epoch, samples in the order of their shard
    epoch 1   a: 7 8 …                  positions only grow

A position means the same sample on every rank and at every world size, so micro-batches are cut from positions as from
those of a dataset. Each rank reads the shards in order and passes over the samples of others. The committed place is
(shard, offset): a shard in the endless order, and samples from its beginning on, which may run on into the shards
behind it where this rank has not read so far.
"""

from __future__ import annotations

import threading
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from elastic_lsopt.data.draws import Draws
from elastic_lsopt.data.order import SampleOrder
from elastic_lsopt.errors import UserError


class ShardStream:
    """An endless run of samples, each exactly once an epoch, read in order.

    `open_shard(name)` begins a shard; it must give the same samples in the same order each time. Cost: every rank reads
    every sample, so let shards hold records and decode in `collate`; a resume reads from the beginning of the committed
    shard. Memory: one open shard. Raises UserError for no shards, or where none has a sample.

    [Note: one reader] The loader's thread reads ahead while the step before commits. Only `read` and `load_state_dict`
    touch the reader, under the lock. `state_dict` looks at the beginnings of shards that the reader has met (a list
    that only grows until it is replaced), so saving never waits for a shard to be read.
    """

    def __init__(self, shards: Sequence[str], open_shard: Callable[[str], Iterable[Any]], seed: int = 0) -> None:
        if not shards:
            raise UserError("a stream needs at least one shard, but the list is empty; check where it comes from.")
        self.shards = tuple(shards)
        self.open_shard = open_shard
        self.order = SampleOrder(len(self.shards), seed)
        self._lock = threading.Lock()
        self._begins = [(0, 0)]  # (position of its first sample, number of the shard), in order
        self._reader: Iterator[Any] | None = None
        self._next = 0  # position of the sample that the reader gives next

    def read(self, first: int, count: int, draws: Draws | None = None) -> list[Any]:
        """The samples at positions first … first + count - 1; cheapest in order of position.

        What `open_shard` draws on the way to a sample starts anew with each position (None: it draws nothing).
        Raises ValueError for a position before the shard that `load_state_dict` has named.
        """
        with self._lock:  # see [Note: one reader]
            if self._reader is None or first < self._next:
                self._rewind(first)
            while self._next < first:  # other ranks' samples, which may have drawn as well
                self._take(draws)
            return [self._take(draws) for _ in range(count)]

    def _take(self, draws: Draws | None) -> Any:
        """The sample at the reader's place."""
        assert self._reader is not None
        if draws is not None:
            draws.start("position", self._next)
        try:
            row = next(self._reader)
        except BaseException:  # a generator that has raised has ended: whoever asks again begins the shard again
            self._reader = None
            raise
        self._next += 1
        return row

    def state_dict(self, committed: int) -> dict[str, int]:
        """The committed place: a shard's number in the endless order, and samples from its beginning on.

        Ranks may say it in different words, since the shard is the last that this rank has met; each is right.
        """
        begin, shard = self._begin_before(committed)
        return {"shard": shard, "offset": committed - begin, "seed": self.order.seed, "shards": self.digest()}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go to the committed place (`committed` among the keys). Raises UserError for other shards or another seed."""
        for name, now in (("seed", self.order.seed), ("shards", self.digest())):
            if state_dict.get(name) != now:
                raise UserError(
                    f"the checkpoint was made with other {'shards' if name == 'shards' else 'order of shards'} "
                    f"({name}={state_dict.get(name)}, now {now}); use the same list and seed, or start anew."
                )
        with self._lock:
            self._begins = [(state_dict["committed"] - state_dict["offset"], state_dict["shard"])]
            self._reader = None

    def digest(self) -> int:
        """Of the shards' names, in their order."""
        return zlib.crc32("\n".join(self.shards).encode())

    def _begin_before(self, position: int) -> tuple[int, int]:
        begins = self._begins
        known = bisect_right(begins, position, key=lambda begin: begin[0])
        if not known:
            raise ValueError(f"position {position} lies before the committed shard, which begins at {begins[0][0]}.")
        return begins[known - 1]

    def _rewind(self, position: int) -> None:
        """Let the reader begin again at the last shard that is known to begin at or before `position`."""
        begin = self._begin_before(position)
        self._begins = self._begins[: self._begins.index(begin) + 1]
        self._next, self._reader = begin[0], _samples(self.shards, self.open_shard, self.order, self._begins, *begin)


def _samples(
    shards: Sequence[str], open_shard: Callable[[str], Iterable[Any]], order: SampleOrder,
    begins: list[tuple[int, int]], position: int, shard: int,
) -> Iterator[Any]:  # fmt: skip
    """All samples from the beginning of a shard on, for ever; notes in `begins` where each shard begins.

    It does not know the stream that holds it, so an open shard is closed with the stream and not by a garbage
    collection: a DataLoader that is ended by one waits 5 s for each of its workers, in whatever thread that is.
    """
    empty = 0
    while empty < 2 * len(shards):  # two epochs: the same shard may be last in one and first in the next
        empty += 1
        for sample in open_shard(shards[int(order.at([shard])[0])]):
            empty = 0
            position += 1
            yield sample
        shard += 1
        begins.append((position, shard))
    raise UserError(f"none of the {len(shards)} shards has a sample; check what open_shard gives.")
