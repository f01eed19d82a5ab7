"""What the ranks of a job tell each other when something goes wrong. (Starting workers: tests/cli/test_train.py.)"""

from __future__ import annotations

from typing import Any

import pytest

from tests.jobs import in_ranks

pytestmark = pytest.mark.fast


def test_what_rank_0_cannot_do_is_refused_on_all(ranks: Any) -> None:
    assert in_ranks(ranks, 3, "told_by_first", fails=False) == ["done", "None", "None"]
    assert in_ranks(ranks, 3, "told_by_first", fails=True) == ["refused: the folder is märchenhaft"] * 3


def test_the_first_failure_is_the_same_for_all(ranks: Any) -> None:
    assert in_ranks(ranks, 3, "first_failures") == [["of rank 1"]] * 3
