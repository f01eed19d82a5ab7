"""Rows of whole documents: each once, none over the length, few rows, and the same at every call."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic_lsopt.data.best_fit import best_fit

pytestmark = pytest.mark.fast


def rows_of(lengths: list[int], capacity: int) -> list[list[int]]:
    order, ends = best_fit(lengths, capacity)
    return [row.tolist() for row in np.split(order, ends[:-1])] if len(ends) else []


def fewest(lengths: list[int], capacity: int) -> int:
    """By trying all orders: next fit is optimal in one of them."""

    def next_fit(order: tuple[int, ...]) -> int:
        count, room = 0, 0
        for size in order:
            count, room = (count, room - size) if size <= room else (count + 1, capacity - size)
        return count

    return min(map(next_fit, set(permutations(lengths))))


def test_an_example_by_hand() -> None:
    assert rows_of([5, 2, 7, 3, 1], 8) == [[2, 4], [0, 3], [1]]
    assert rows_of([4, 4, 4], 8) == [[0, 1], [2]] and rows_of([8, 8], 8) == [[0], [1]] and rows_of([], 8) == []
    with pytest.raises(ValueError, match=r"1 … capacity=8"):
        best_fit([9], 8)


@given(st.lists(st.integers(1, 12), max_size=7))
def test_few_rows_hold_each_document_once(lengths: list[int]) -> None:
    rows = rows_of(lengths, 12)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= 12 and row == sorted(row) for row in rows)
    assert len(rows) <= 11 / 9 * fewest(lengths, 12) + 4
    assert rows_of(lengths, 12) == rows


def test_many_documents_fill_their_rows() -> None:
    lengths = np.random.default_rng(0).integers(1, 300, 20_000)
    _, ends = best_fit(lengths, 1024)
    assert len(ends) <= 1.01 * lengths.sum() / 1024
