"""What samples draw belongs to the sample: the same at any world size and after a resume, and nobody else's changes."""

from __future__ import annotations

import gc
import logging
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import is_in_any_mode_without_ignore_compile_internals
from torch.utils.data import DataLoader

from elastic_lsopt.data.draws import drawing_beside_others
from elastic_lsopt.data.loader import StepLoader
from elastic_lsopt.data.shards import ShardStream
from elastic_lsopt.errors import UserError
from elastic_lsopt.oracle.replay.slot import replayed
from tests.processes.ranks import ROOT, rank_environment

pytestmark = pytest.mark.fast
CPU = torch.device("cpu")

DRAWS: dict[str, Callable[[], float]] = {
    "torch.rand": lambda: torch.rand(()).item(),
    "in place": lambda: torch.empty(()).normal_().item(),
    "like": lambda: torch.rand_like(torch.zeros(3)).sum().item(),
    "randint and randperm": lambda: float(torch.randint(0, 1_000_000, ()) * 100 + torch.randperm(100)[0]),
    "dropout": lambda: torch.nn.functional.dropout(torch.linspace(1, 2, 64).exp(), 0.5).sum().item(),
    "python": random.random,
    "numpy": lambda: float(np.random.rand()),
    "all": lambda: torch.rand(()).item() + random.random() + float(np.random.normal()),
}
READ_BY_THE_TRAINING_THREAD = ("python", "numpy", "all")


class Augmented:
    """Twelve samples, each its number and what it has drawn."""

    def __init__(self, draw: Callable[[], float]) -> None:
        self.draw = draw

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> tuple[int, float]:
        return index, self.draw()


def loader(source: Any, *, rank: int = 0, world: int = 1, steps: int = 6, collate: Any = list) -> StepLoader:
    return StepLoader(
        source, collate, global_batch_size=6, microbatch_size=2, seed=3, rank=rank, world=world, total_samples=6 * steps
    )


def read(source: Any, world: int = 1, resume_at: int = 0, **more: Any) -> list[Any]:
    """What all ranks together read from a committed cursor on, in the order of units.

    One rank after the other: in this process they would share the common generators, which each has to itself.
    """
    steps: list[list[Any]] = []
    for rank in range(world):
        one = loader(source(), rank=rank, world=world, **more)
        if resume_at:
            one.load_state_dict({"committed": resume_at, **one.source.state_dict(resume_at)})
        for step, units in enumerate(one):
            if rank == 0:
                steps.append([])
            steps[step] += [unit for unit in units if not unit.idle]
            one.commit(6)
    return [row for units in steps for unit in sorted(units, key=lambda u: u.index) for row in unit.batch]


@pytest.mark.parametrize("name", DRAWS)
def test_the_same_at_any_world_and_after_a_resume(name: str) -> None:
    """Three epochs; whatever the common generators hold, which nobody may change."""
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    alone = read(lambda: Augmented(DRAWS[name]))
    torch.manual_seed(2)
    random.seed(2)
    np.random.seed(2)
    common = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    assert read(lambda: Augmented(DRAWS[name]), world=2) == alone
    assert read(lambda: Augmented(DRAWS[name]), world=3) == alone
    assert read(lambda: Augmented(DRAWS[name]), resume_at=18) == alone[18:]
    assert torch.equal(common[0], torch.get_rng_state())
    assert common[1] == random.getstate() and np.array_equal(common[2], np.random.get_state()[1])
    drawn = [x for _, x in alone]
    assert len(set(drawn)) == len(drawn), "a sample drew what another, or it in another epoch, had drawn"


@pytest.mark.parametrize("name", DRAWS)
def test_a_collate_function_draws_too(name: str) -> None:
    def mask(rows: list[Any]) -> list[Any]:
        return [(i, DRAWS[name]()) for i, _ in rows]

    alone = read(lambda: Augmented(lambda: 0.0), collate=mask)
    assert read(lambda: Augmented(lambda: 0.0), world=3, collate=mask) == alone
    assert len({x for _, x in alone}) == len(alone)


def test_nobody_elses_numbers_change_while_a_thread_reads_ahead() -> None:
    """The training thread's dropout, two passes a step, and numbers of its own, beside a slow reader that draws."""
    reading, trained = threading.Event(), threading.Event()

    def slowly() -> float:
        if threading.current_thread() is not threading.main_thread():
            reading.set()
            trained.wait(0.005)
        return sum(torch.rand(()).item() for _ in range(20))

    dropout, x = nn.Dropout(0.5), torch.ones(400)

    def passes(seed: int) -> list[torch.Tensor]:
        with replayed(seed, CPU):
            return [dropout(x) for _ in range(10)]

    torch.manual_seed(5)
    wanted, wanted_masks = [torch.rand(3) for _ in range(20)], [passes(step) for step in range(20)]
    torch.manual_seed(5)
    got, masks = [], []
    for step, _ in enumerate(loader(Augmented(slowly), steps=20)):
        reading.wait(1)
        reading.clear()
        got.append(torch.rand(3))
        for _ in range(2):
            masks.append((step, passes(step)))
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    assert all(torch.equal(a, b) for step, m in masks for a, b in zip(m, wanted_masks[step], strict=True))


def threads_of(draw: Callable[[], float], caplog: pytest.LogCaptureFixture) -> tuple[set[bool], str]:
    """Whether the steps behind the first were read by the training thread, and what was said of it."""
    seen: list[bool] = []

    def collate(rows: list[Any]) -> list[Any]:
        seen.append(threading.current_thread() is threading.main_thread())
        return rows

    with caplog.at_level(logging.WARNING, logger="elastic_lsopt"):
        logging.getLogger("elastic_lsopt").propagate = True
        for _ in loader(Augmented(draw), collate=collate):
            pass
    return set(seen[-9:]), caplog.text


@pytest.mark.parametrize("name", DRAWS)
def test_who_reads(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """torch's numbers are drawn ahead by a thread; others by the training thread, which says so once."""
    by_main, said = threads_of(DRAWS[name], caplog)
    assert by_main == {name in READ_BY_THE_TRAINING_THREAD}
    assert said.count("no step is read ahead") == (name in READ_BY_THE_TRAINING_THREAD)


def test_who_seeds_the_common_generator_is_read_by_the_training_thread(caplog: pytest.LogCaptureFixture) -> None:
    """`torch.manual_seed` in a thread would restart the training thread's dropout."""

    def seeded() -> float:
        torch.manual_seed(7)
        return torch.rand(()).item()

    by_main, said = threads_of(seeded, caplog)
    assert by_main == {True} and "by hand" in said
    wanted = torch.rand((), generator=torch.Generator().manual_seed(7)).item()
    assert {x for _, x in read(lambda: Augmented(seeded))} == {wanted}


def test_who_draws_from_another_generator_only_later(caplog: pytest.LogCaptureFixture) -> None:
    """The thread's numbers of that step are thrown away: the samples are those of any other world."""

    def later() -> float:
        return random.random() if torch.rand(()).item() < 0.1 else torch.rand(()).item()

    alone = read(lambda: Augmented(later), steps=20)
    assert "Python's random" in caplog.text
    assert read(lambda: Augmented(later), world=2, steps=20) == alone


def test_a_generator_of_its_own_is_left_alone() -> None:
    own = torch.Generator().manual_seed(9)
    drawn = [x for _, x in read(lambda: Augmented(lambda: torch.rand((), generator=own).item()), steps=2)]
    plain = torch.Generator().manual_seed(9)
    assert drawn == [torch.rand((), generator=plain).item() for _ in range(12)]


def test_an_operation_that_takes_no_generator_is_refused_unless_it_draws_nothing() -> None:
    q = torch.ones(1, 1, 4, 8)
    with drawing_beside_others(0):
        torch.nn.functional.scaled_dot_product_attention(q, q, q)
        torch.native_dropout(q, 0.5, False)
        with pytest.raises(UserError, match=r"native_dropout.*takes no other"):
            torch.native_dropout(q, 0.5, True)


def test_torch_compile_in_another_thread_does_not_see_the_diversion() -> None:
    """torch's flag is the whole process's: while it is set, frames stay uncompiled."""
    with drawing_beside_others(0):
        assert not is_in_any_mode_without_ignore_compile_internals()


class Workers:
    """Shards read by a DataLoader's worker processes, which draw."""

    def __init__(self, draw: Callable[[], float]) -> None:
        self.draw = draw

    def __call__(self, name: str) -> Iterator[float]:
        rows: Any = Augmented(self.draw)
        return iter(DataLoader(rows, batch_size=None, num_workers=2))


def test_a_stream_draws_by_position() -> None:
    """A reader passes over other ranks' samples, which may have drawn; a resume begins in the middle."""

    def shard(name: str) -> Iterator[tuple[str, float, float]]:
        order = torch.randperm(6).tolist()
        for i in order:
            yield f"{name}{i}", torch.rand(()).item(), random.random()

    def stream() -> ShardStream:
        return ShardStream(["a", "b", "c"], shard, seed=3)

    alone = read(stream)
    assert read(stream, world=2) == alone
    assert read(stream, world=3) == alone
    assert len({x for _, x, _ in alone}) == len(alone) == len({x for _, _, x in alone})


@pytest.mark.long
def test_worker_processes_of_a_dataloader() -> None:
    """They inherit the reading thread's diversion and must not obey it: each would draw the same numbers."""
    alone = read(lambda: ShardStream(["a"], Workers(DRAWS["torch.rand"]), seed=3), steps=3)
    assert len({x for _, x in alone}) == len(alone)
    assert read(lambda: ShardStream(["a"], Workers(DRAWS["torch.rand"]), seed=3), world=2, steps=3) == alone


def test_worker_processes_that_the_reading_thread_starts_end_well() -> None:
    """Else torch raises in the main thread, wherever that is: "DataLoader worker (pid …) exited unexpectedly"."""
    shards: list[Any] = []

    def shard(name: str) -> Iterator[Any]:
        shards.append(Workers(lambda: 0.0)(name))
        return shards[-1]

    read(lambda: ShardStream(["a", "b"], shard, seed=3), steps=4)
    started_beside = shards[-1]._workers
    workers = [worker for one in shards for worker in one._workers]
    for one in shards:
        one._shutdown_workers()
    assert started_beside and [worker.exitcode for worker in workers] == [0] * 2 * len(shards)


ENDS_EARLY = """
import sys, time
from elastic_lsopt.data.loader import StepLoader
class Slow:
    def __len__(self):
        return 12
    def __getitem__(self, i):
        time.sleep(0.1)
        return i
loader = StepLoader(Slow(), list, global_batch_size=6, microbatch_size=6, seed=3, rank=0, world=1, total_samples=12)
read = Slow.__getitem__
Slow.__getitem__ = lambda self, i: (read(self, i), print("read", flush=True))
steps = iter(loader)
next(steps)
"""


@pytest.mark.long
def test_a_step_that_is_being_read_when_the_program_ends_is_read() -> None:
    """The interpreter's end would stop the thread inside of torch, and the process with it."""
    done = subprocess.run(
        [sys.executable, "-c", ENDS_EARLY], cwd=ROOT, env=rank_environment(), text=True, capture_output=True,
        timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout.count("read") == 12, done


def test_a_stream_that_is_dropped_ends_its_worker_processes_at_once() -> None:
    """A garbage collection would end them too, some time, and wait 5 s for each: here is none."""
    workers: list[Any] = []

    def shard(name: str) -> Iterator[Any]:
        opened: Any = Workers(lambda: 0.0)(name)
        workers.extend(opened._workers)
        return opened

    gc.disable()
    try:
        read(lambda: ShardStream(["a"], shard, seed=3), steps=1)
        assert [worker.exitcode for worker in workers] == [0, 0]
    finally:
        gc.enable()


def test_replay_touches_the_generators_of_its_device_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.manual_seed would start every GPU anew, and nobody puts those back."""
    touched: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", touched.append)
    before = torch.get_rng_state()
    with replayed(4, CPU):
        first = torch.rand(3)
        with replayed(9, CPU):
            torch.rand(5)
        second = torch.rand(3)
    assert torch.equal(before, torch.get_rng_state()) and not touched
    plain = torch.Generator().manual_seed(4)
    assert torch.equal(first, torch.rand(3, generator=plain))
    assert torch.equal(second, torch.rand(3, generator=plain))
