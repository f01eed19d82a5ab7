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


def test_who_has_failed_stays_until_all_have_said_so(ranks: Any) -> None:
    """A launcher ends all at the first end, and a word that is not out by then is lost."""
    assert all(seconds >= 1.0 for seconds in in_ranks(ranks, 3, "last_words", silent=-1, limit_s=60.0))
    found = in_ranks(ranks, 3, "last_words", silent=0, limit_s=2.0)
    assert all(2.0 <= seconds < 30.0 for seconds in found[1:]), found
