"""The sample order is a fresh permutation of every epoch, and a pure function of (seed, position)."""

from __future__ import annotations

import time
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from elastic_lsopt.data.order import LARGEST, SampleOrder
from elastic_lsopt.errors import UserError

pytestmark = pytest.mark.fast
seeds = st.integers(0, 2**64 - 1)
sizes = st.integers(1, 3000)


@given(n=sizes, seed=seeds, epoch=st.integers(0, 2**20))
def test_each_sample_once_an_epoch(n: int, seed: int, epoch: int) -> None:
    ids = SampleOrder(n, seed).at(np.arange(epoch * n, (epoch + 1) * n))
    assert sorted(ids.tolist()) == list(range(n))


@pytest.mark.parametrize("n", [2**16 - 1, 2**16, 2**16 + 1, 10**6 + 3])
def test_each_sample_once_an_epoch_of_many(n: int) -> None:
    assert np.array_equal(np.sort(SampleOrder(n, 5).at(np.arange(n))), np.arange(n))


@pytest.mark.long
@given(n=sizes, seed=seeds, start=st.integers(0, 2**30), cuts=st.lists(st.integers(0, 200), max_size=6))
def test_a_position_does_not_feel_its_chunk(n: int, seed: int, start: int, cuts: list[int]) -> None:
    order = SampleOrder(n, seed)
    positions = np.arange(start, start + 200)
    one_by_one = [int(order.at(p)) for p in positions[::17]]
    chunks = np.split(positions, sorted(cuts))
    assert np.concatenate([order.at(c) for c in chunks]).tolist() == order.at(positions).tolist()
    assert order.at(positions)[::17].tolist() == one_by_one
    assert order.at(positions[::-1]).tolist() == order.at(positions)[::-1].tolist()


@given(seed=seeds, other=seeds)
def test_epochs_and_seeds_differ(seed: int, other: int) -> None:
    n = 500
    first, second = SampleOrder(n, seed).at(np.arange(2 * n)).reshape(2, n)
    # Two independent permutations agree in Poisson(1) places: 15 or more has probability 3e-13.
    assert (first == second).sum() < 15
    assert (first == np.arange(n)).sum() < 15
    if other != seed:
        assert (first == SampleOrder(n, other).at(np.arange(n))).sum() < 15


def test_neighbouring_seeds_and_epochs_are_not_shifts_of_each_other() -> None:
    n = 200
    runs = [SampleOrder(n, seed).at(np.arange(20 * n)).reshape(20, n) for seed in range(20)]
    rows = {tuple(row) for run in runs for row in run}
    assert len(rows) == 400


@pytest.mark.parametrize("n", [7, 64, 1000])
def test_every_sample_is_first_equally_often(n: int) -> None:
    draws = 100 * n
    firsts = np.concatenate([SampleOrder(n, seed).at(np.arange(0, draws * n // 10, n)) for seed in range(10)])
    assert stats.chisquare(np.bincount(firsts, minlength=n)).pvalue > 1e-4


@pytest.mark.parametrize("n", [3, 4, 5])
def test_all_permutations_are_equally_likely(n: int) -> None:
    drawn = SampleOrder(n, 11).at(np.arange(24_000 * n)).reshape(-1, n)
    index = {p: i for i, p in enumerate(permutations(range(n)))}
    counts = np.bincount([index[tuple(row)] for row in drawn.tolist()], minlength=len(index))
    assert stats.chisquare(counts).pvalue > 1e-4


def test_odd_and_even_permutations_both_come() -> None:
    """A square of odd sides would give even permutations only."""
    drawn = SampleOrder(9, 0).at(np.arange(9 * 200)).reshape(200, 9)
    odd = [np.linalg.det(np.eye(9)[row]) < 0 for row in drawn]
    assert 60 < sum(odd) < 140


def test_neighbours_are_not_correlated() -> None:
    n = 100_000
    ids = SampleOrder(n, 3).at(np.arange(n))
    for lag in (1, 2, 316, 317, 318):  # 317 is about sqrt(n), the side of the box
        r = np.corrcoef(ids[:-lag], ids[lag:])[0, 1]
        assert abs(r) < 5 / np.sqrt(n)


@settings(max_examples=20)
@given(start=st.integers(0, 2**62))
def test_the_largest_dataset(start: int) -> None:
    ids = SampleOrder(LARGEST, 1).at(np.arange(start, start + 1000))
    assert ids.min() >= 0 and ids.max() < LARGEST and len(set(ids.tolist())) == 1000


def test_shapes_and_bounds() -> None:
    order = SampleOrder(10, 0)
    assert order.at([]).shape == (0,) and order.at(3).shape == () and order.at([[1, 2], [3, 4]]).shape == (2, 2)
    with pytest.raises(ValueError, match="position -1"):
        order.at([-1])
    for samples, seed in ((0, 0), (LARGEST + 1, 0), (1, -1), (1, 2**64)):
        with pytest.raises(UserError, match="between"):
            SampleOrder(samples, seed)


def test_the_order_is_pinned() -> None:
    """A release that changes these numbers breaks the resume of every run that was saved before it."""
    assert SampleOrder(10, 0).at(range(20)).tolist() == [
        *[8, 5, 3, 7, 2, 9, 0, 4, 1, 6],
        *[9, 1, 6, 8, 7, 5, 3, 2, 4, 0],
    ]


@pytest.mark.long
def test_speed() -> None:
    order = SampleOrder(10**9 + 7, 2)
    positions = np.arange(1_000_000)
    order.at(positions[:1000])
    seconds = []
    for _ in range(3):
        start = time.process_time()  # of this thread's own computing: another program on this core doesn't count
        order.at(positions)
        seconds.append(time.process_time() - start)
    rate = len(positions) / min(seconds)
    assert rate >= 2e5, f"{rate:.3g} positions/s; a quiet core of 2024 makes 1.5e6"
