"""Shards that can only be iterated: each sample once an epoch, at any world size, over any sequence of changes."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_lsopt.data.loader import StepLoader
from elastic_lsopt.data.shards import ShardStream
from elastic_lsopt.errors import StaleGeneration, UserError

pytestmark = pytest.mark.fast

SIZES = [3, 0, 7, 1, 5, 0, 11]


def open_shard(name: str) -> Iterator[str]:
    """Shard "2:7" holds "2.0" … "2.6"."""
    shard, size = name.split(":")
    return iter([f"{shard}.{i}" for i in range(int(size))])


def names(sizes: list[int]) -> list[str]:
    return [f"{shard}:{size}" for shard, size in enumerate(sizes)]


def stream(sizes: list[int] = SIZES, seed: int = 4) -> ShardStream:
    return ShardStream(names(sizes), open_shard, seed)


def endless(sizes: list[int], seed: int) -> Iterator[str]:
    """The plain loop: epoch after epoch, the shards in that epoch's order, all their samples."""
    order, n = stream(sizes, seed).order, len(sizes)
    for epoch in count():
        for shard in order.at(range(epoch * n, (epoch + 1) * n)).tolist():
            yield from open_shard(f"{shard}:{sizes[shard]}")


@pytest.mark.long
@given(
    sizes=st.lists(st.integers(0, 6), min_size=1, max_size=6).filter(any),
    seed=st.integers(0, 99),
    reads=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 9)), max_size=8),
)
def test_a_position_is_the_same_sample_in_whatever_order_it_is_read(sizes: Any, seed: int, reads: Any) -> None:
    plain = list(islice(endless(sizes, seed), 60))
    read = stream(sizes, seed)
    for first, size in reads:
        assert read.read(first, size) == plain[first : first + size]


def test_each_sample_once_an_epoch_and_the_shards_in_another_order() -> None:
    n, read = sum(SIZES), stream()
    whole = sorted(f"{shard}.{i}" for shard, size in enumerate(SIZES) for i in range(size))
    epochs = [read.read(epoch * n, n) for epoch in range(3)]
    assert all(sorted(epoch) == whole for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_shards_are_opened_in_order_and_not_again(tmp_path: Path) -> None:
    opened: list[str] = []

    def spy(name: str) -> Iterator[str]:
        opened.append(name)
        return open_shard(name)

    read = ShardStream(names([4, 4, 4]), spy, 0)
    for position in range(0, 12, 2):
        read.read(position, 1)  # every other unit is another rank's
    assert len(opened) == 3
    state = {"committed": 9, **read.state_dict(9)}
    again = ShardStream(names([4, 4, 4]), spy, 0)
    again.load_state_dict(state)
    assert again.read(9, 1) == read.read(9, 1)
    assert opened[3] == opened[2] and len(opened) <= 5  # from the beginning of the committed shard, not of the epoch


def loader(rank: int, world: int, *, batch: int = 6, unit: int = 2, total: int = 61, seed: int = 4) -> StepLoader:
    return StepLoader(
        stream(seed=seed), list, global_batch_size=batch, microbatch_size=unit, seed=0, rank=rank, world=world,
        total_samples=total,
    )  # fmt: skip


changes = st.lists(
    st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 4), st.integers(0, 4), st.integers(0, 9)),
    max_size=6,
)


@pytest.mark.long
@settings(max_examples=20)
@given(changes=changes)
def test_each_sample_once_over_any_sequence_of_changes(changes: Any) -> None:
    """Each generation: (world, units a step, unit, steps committed, whose state is kept). One step more is read, and
    done again by the next generation on the same samples."""
    committed: list[str] = []
    state, again = loader(0, 1).state_dict(), None
    for world, units, unit, steps, whose in [*changes, (3, 3, 2, 1000, 0)]:
        ranks = [loader(r, world, batch=units * unit, unit=unit) for r in range(world)]
        for own in ranks:
            own.load_state_dict(json.loads(json.dumps(state)))
        for n, mine in enumerate(zip(*map(iter, ranks), strict=True)):
            union = sorted((u for own in mine for u in own if not u.idle), key=lambda u: u.index)
            rows = [row for u in union for row in u.batch]
            if again is not None:
                k = min(len(again), len(rows))
                assert rows[:k] == again[:k]
                again = None
            if n == steps:
                again = rows
                break
            committed += rows
            for own in ranks:
                own.commit(len(rows))
        state = ranks[whose % world].state_dict()
        for own in ranks:
            own.close()
    assert committed == list(islice(endless(SIZES, 4), 61))


def test_saving_does_not_wait_for_a_shard_that_is_being_read() -> None:
    """The thread that reads ahead hangs in a slow shard; the cursor is saved all the same, and is right."""
    go = threading.Event()

    def slow(name: str) -> Iterator[str]:
        for i, sample in enumerate(open_shard(name)):
            if i == 4:
                assert go.wait(20)
            yield sample

    own = StepLoader(
        ShardStream(["0:8"], slow),
        list,
        global_batch_size=2,
        microbatch_size=2,
        seed=0,
        rank=0,
        world=1,
        total_samples=8,
    )
    steps = iter(own)
    next(steps)
    next(steps)  # the third step is on its way
    own.commit(2)
    own.commit(2)
    state = own.state_dict()
    assert (state["committed"], state["shard"], state["offset"]) == (4, 0, 4)
    go.set()
    assert [u.batch for u in next(steps)] == [["0.4", "0.5"]]
    own.close()
    with pytest.raises(StaleGeneration):
        next(steps)


def test_what_is_refused() -> None:
    with pytest.raises(UserError, match="at least one shard"):
        ShardStream([], open_shard)
    with pytest.raises(UserError, match="none of the 2 shards has a sample"):
        stream([0, 0]).read(0, 1)
    state = {"committed": 5, **stream().state_dict(5)}
    with pytest.raises(UserError, match="other shards"):
        stream([*SIZES[:-1], 12]).load_state_dict(state)
    with pytest.raises(UserError, match=r"other order of shards \(seed=4, now 5\)"):
        stream(seed=5).load_state_dict(state)
    read = stream()
    read.read(0, 20)
    moved = stream()
    moved.load_state_dict({"committed": 20, **read.state_dict(20)})
    with pytest.raises(ValueError, match="before the committed shard"):
        moved.read(0, 1)


def test_a_dataset_and_a_stream_do_not_take_each_others_place() -> None:
    indexed = StepLoader(
        list(range(9)), list, global_batch_size=2, microbatch_size=2, seed=4, rank=0, world=1, total_samples=8
    )
    for one, other in ((indexed, loader(0, 1)), (loader(0, 1), indexed)):
        with pytest.raises(UserError):
            one.load_state_dict(other.state_dict())
