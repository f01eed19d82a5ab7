"""Any world reads the same units, a killed run reads on where it stopped, each sample comes once an epoch."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torchdata.stateful_dataloader import StatefulDataLoader
from torchdata.stateful_dataloader.stateful import Stateful

from elastic_lsopt.data.loader import StepLoader
from elastic_lsopt.errors import StaleGeneration, UserError

pytestmark = pytest.mark.fast


def make(
    n: int = 50, batch: int = 8, unit: int = 3, *, rank: int = 0, world: int = 1, steps: int = 20, **more: Any
) -> StepLoader:
    """A loader whose samples are their own numbers, times ten."""
    return StepLoader(
        [10 * i for i in range(n)],
        list,
        global_batch_size=batch,
        microbatch_size=unit,
        seed=4,
        rank=rank,
        world=world,
        **{"total_samples": steps * batch, **more},
    )


def samples(units: list[Any]) -> list[int]:
    return [x for unit in units if not unit.idle for x in unit.batch]


cuts = st.tuples(st.integers(1, 12), st.integers(1, 30)).filter(lambda c: c[0] <= c[1])


@pytest.mark.long
@settings(max_examples=50)
@given(n=st.integers(1, 60), cut=cuts, world=st.integers(1, 9))
def test_all_ranks_together_read_what_one_would(n: int, cut: tuple[int, int], world: int) -> None:
    unit, batch = cut
    alone = make(n, batch, unit, steps=2000)
    ranks = [make(n, batch, unit, rank=rank, world=world, steps=2000) for rank in range(world)]
    for position in (0, batch, 7 * batch, 1000):
        mine = [loader.microbatches_at(position) for loader in ranks]
        assert all(mine)
        union = sorted((u for units in mine for u in units if not u.idle), key=lambda u: u.index)
        assert union == alone.microbatches_at(position)
        assert [u.index for u in union] == list(range(-(-batch // unit)))
        assert {len(u.batch) for u in union[:-1]} <= {unit}
        assert sum(len(u.batch) for u in union) == batch


def test_a_rank_without_a_unit_gets_unit_0_to_idle_on() -> None:
    busy, idle = make(batch=6, unit=3, world=3), make(batch=6, unit=3, rank=2, world=3)
    [unit] = idle.microbatches_at(0)
    assert unit.idle and unit.index == 0 and unit.batch == busy.microbatches_at(0)[0].batch
    assert not busy.microbatches_at(0)[0].idle


@pytest.mark.long
@settings(max_examples=50)
@given(n=st.integers(1, 40), cut=cuts)
def test_each_sample_once_an_epoch_across_batches(n: int, cut: tuple[int, int]) -> None:
    unit, batch = cut
    read = [x for units in make(n, batch, unit, steps=-(-3 * n // batch)) for x in samples(units)]
    for epoch in range(3):
        assert sorted(read[epoch * n : (epoch + 1) * n]) == [10 * i for i in range(n)]


@pytest.mark.long
@settings(max_examples=25)
@given(kills=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 5)), max_size=4))
def test_killed_and_resumed_anywhere_equals_never_stopped(kills: list[tuple[int, int]]) -> None:
    """Each life commits some steps, has read one more when it dies, and goes on at another world size."""
    undisturbed = [sorted(samples(units)) for units in make()]
    seen, state = [], make().state_dict()
    for steps, world in [*kills, (20, 2)]:
        ranks = [make(rank=r, world=world) for r in range(world)]
        for loader in ranks:
            loader.load_state_dict(state)
        for units in islice(zip(*ranks, strict=True), steps):
            seen.append(sorted(x for mine in units for x in samples(mine)))
            for loader in ranks:
                loader.commit(8)
        state = ranks[-1].state_dict()
        next(iter(ranks[0]), None)
    assert seen == undisturbed


def test_a_cursor_off_the_batch_boundary_reads_on_exactly() -> None:
    whole = [x for units in make(batch=1, unit=1, steps=160) for x in samples(units)]
    loader = make()
    loader.load_state_dict({**loader.state_dict(), "committed": 13})
    read = [x for units in loader for x in samples(units)]
    assert read == whole[13:]


@pytest.mark.long
@settings(max_examples=40)
@example(n=40, cut=(8, 32), total=33, parts=8, world=2)  # a rest of one sample, which no eight parts can share
@given(n=st.integers(1, 40), cut=cuts, total=st.integers(1, 100), parts=st.integers(1, 8), world=st.integers(1, 5))
def test_the_job_ends_at_its_last_sample(n: int, cut: tuple[int, int], total: int, parts: int, world: int) -> None:
    """No sample more, none twice; the last step is cut finely enough for the method's parts."""
    unit, batch = cut
    whole = [x for units in make(n, 1, 1, total_samples=total) for x in samples(units)]
    ranks = [make(n, batch, unit, rank=r, world=world, total_samples=total, parts=parts) for r in range(world)]
    position, read = 0, []
    for units in zip(*ranks, strict=True):
        union = sorted((u for mine in units for u in mine if not u.idle), key=lambda u: u.index)
        assert [u.index for u in union] == list(range(len(union)))
        taken = ranks[0].samples_at(position)
        assert sum(len(u.batch) for u in union) == taken
        if taken != batch:
            assert position + taken == total and len(union) >= min(parts, total)
        read += samples(union)
        position += taken
    assert read == whole and position == total


changes = st.lists(
    st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 6), st.integers(0, 4)), min_size=1, max_size=6
)


@pytest.mark.long
@settings(max_examples=20)
@given(changes=changes)
def test_each_sample_once_whatever_world_and_batch_each_generation_has(changes: Any) -> None:
    """Each generation: (world, units a step, unit, steps committed), one more in flight that the next does again."""
    total, committed, state = 137, [], make(total_samples=137).state_dict()
    for world, units, unit, steps in [*changes, (3, 4, 2, 1000)]:
        ranks = [make(50, units * unit, unit, rank=r, world=world, total_samples=total) for r in range(world)]
        for loader in ranks:
            loader.load_state_dict(state)
        for n, mine in enumerate(zip(*map(iter, ranks), strict=True)):
            if n == steps:
                break  # read, perhaps computed, not committed
            union = sorted((u for own in mine for u in own if not u.idle), key=lambda u: u.index)
            committed += samples(union)
            for loader in ranks:
                loader.commit(len(samples(union)))
        state = ranks[0].state_dict()
        for loader in ranks:
            loader.close()
    assert committed == [x for units in make(batch=1, unit=1, total_samples=total) for x in samples(units)]


def test_a_plans_uneven_shares() -> None:
    shares = [(0, 2, 3, 4), (1, 5)]
    ranks = [make(batch=12, unit=2, rank=r, world=2, microbatches=shares[r], total_samples=31) for r in range(2)]
    alone = make(batch=12, unit=2, total_samples=31)
    for position in (0, 12, 24):
        own = [loader.microbatches_at(position) for loader in ranks]
        union = sorted((u for mine in own for u in mine if not u.idle), key=lambda u: u.index)
        assert union == alone.microbatches_at(position)
        if position < 24:
            assert [[u.index for u in mine] for mine in own] == [[0, 2, 3, 4], [1, 5]]
    assert [u.index for u in ranks[0].microbatches_at(24)] == [0, 2]  # the small last step is dealt evenly


RAMP = {0: 4, 4: 8, 12: 12, 24: 12, 36: 12, 48: 12, 60: 12}


@pytest.mark.parametrize("world", [1, 2, 3])
def test_a_batch_that_changes_on_the_way(world: int) -> None:
    """Every world reads the same micro-batches; each sample comes once, in order; the last step takes the rest."""
    ranks = [
        make(batch=4, unit=4, rank=r, world=world, total_samples=65, batch_at=RAMP.__getitem__) for r in range(world)
    ]
    assert len(ranks[0]) == 7
    seen, position = [], 0
    for steps in zip(*ranks, strict=True):
        union = sorted((u for mine in steps for u in mine if not u.idle), key=lambda u: u.index)
        assert union == make(batch=RAMP[position], unit=4, total_samples=65).microbatches_at(position)
        seen += samples(union)
        position = len(seen)
        for loader in ranks:
            loader.commit(len(samples(union)))
    assert seen == [x for step in make(batch=1, unit=1, total_samples=65) for x in samples(step)]


def test_a_batch_that_is_decided_when_a_step_has_ended() -> None:
    """What was read ahead is read anew, in the size that counts then; a resume goes on with it."""
    batch = [4]
    loader = make(batch=4, unit=2, total_samples=40, batch_at=lambda position: batch[0])
    steps = iter(loader)
    sizes = []
    for wanted in (4, 8, 8, 2, 12):
        step = next(steps)
        sizes.append(len(samples(step)))
        loader.commit(sizes[-1])
        batch[0] = wanted
    assert sizes == [4, 4, 8, 8, 2]
    again = make(batch=4, unit=2, total_samples=40, batch_at=lambda position: batch[0])
    again.load_state_dict(loader.state_dict())
    rest = [samples(step) for step in again]
    assert [len(step) for step in rest] == [12, 2] and next(steps) is not None
    everything = [x for step in make(batch=1, unit=1, total_samples=40) for x in samples(step)]
    assert [x for step in rest for x in step] == everything[26:]


def test_reading_ahead_is_not_saved() -> None:
    loader = make()
    steps = iter(loader)
    first, _second = next(steps), next(steps)
    assert loader.state_dict()["committed"] == 0
    assert next(iter(loader)) == first
    loader.commit(8)
    assert loader.state_dict()["committed"] == 8


def test_the_next_step_is_prepared_by_a_thread() -> None:
    threads: list[str] = []

    def collate(rows: list[int]) -> list[int]:
        threads.append(threading.current_thread().name)
        return rows

    loader = make(batch=2, unit=2, steps=3)
    loader.collate = collate
    before = threading.active_count()
    assert len(list(loader)) == 3
    assert len(threads) == 3 and all(name.startswith("step-loader") for name in threads[1:])
    assert threading.active_count() == before


def test_what_the_dataset_raises_comes_out_at_its_step() -> None:
    class Rotten(list[int]):
        def __getitem__(self, index: Any) -> Any:
            raise OSError("disk is gone")

    loader = StepLoader(
        Rotten([1, 2]), list, global_batch_size=1, microbatch_size=1, seed=0, rank=0, world=1, total_samples=1
    )
    with pytest.raises(OSError, match="disk is gone"):
        next(iter(loader))


def test_an_iterator_from_before_a_load_is_stale() -> None:
    loader = make()
    steps = iter(loader)
    next(steps)
    loader.load_state_dict({**loader.state_dict(), "committed": 16})
    with pytest.raises(StaleGeneration, match="iter"):
        next(steps)
    assert samples(next(iter(loader))) == samples(make().microbatches_at(16))


def test_a_closed_loader_gives_out_nothing_that_it_has_read_ahead() -> None:
    loader = make()
    steps = iter(loader)
    next(steps)
    before = threading.active_count()
    loader.close()
    for again in (steps, iter(loader)):
        with pytest.raises(StaleGeneration, match="closed"):
            next(again)
    assert threading.active_count() < before


def test_a_state_of_other_data_is_refused() -> None:
    with pytest.raises(UserError, match=r"samples=49 .* samples=50"):
        make().load_state_dict(make(n=49).state_dict())
    with pytest.raises(UserError, match="seed=5"):
        make().load_state_dict({**make().state_dict(), "seed": 5})


def test_bad_arguments() -> None:
    with pytest.raises(UserError, match="0 samples"):
        make(n=0)
    with pytest.raises(UserError, match="global_batch_size"):
        make(batch=2, unit=3)
    with pytest.raises(ValueError, match="rank=2"):
        make(rank=2, world=2)
    with pytest.raises(ValueError, match="commit"):
        make().commit(0)


# The same checks on torchdata's own loader and on ours: what holds for one must hold for the other.


def torchdatas() -> StatefulDataLoader:
    return StatefulDataLoader(range(50), batch_size=5, collate_fn=list)


def committing(loader: Any) -> Iterator[Any]:
    """Steps as a trainer takes them: torchdata's loader has nothing to commit."""
    for step in loader:
        if isinstance(loader, StepLoader):
            loader.commit(loader.global_batch_size)
        yield step


@pytest.mark.parametrize("new", [torchdatas, lambda: make(batch=5, unit=5, steps=10)], ids=["torchdata", "ours"])
@pytest.mark.parametrize("taken", [0, 1, 4, 9])
def test_torchdata_protocol(new: Callable[[], Any], taken: int) -> None:
    loader = new()
    assert isinstance(loader, Stateful) and len(loader) == 10
    whole = list(committing(new()))
    assert len(whole) == 10
    assert list(islice(committing(loader), taken)) == whole[:taken]
    resumed = new()
    resumed.load_state_dict(loader.state_dict())
    assert list(committing(resumed)) == whole[taken:]
    assert loader.state_dict().keys() == resumed.state_dict().keys()
