"""The harness itself: a rank that raises, hangs or dies fails its case in time, with every rank's log."""

from __future__ import annotations

import time

import pytest

from tests.processes.ranks import RankFailure, Ranks


@pytest.mark.parametrize("how", ["raise", "hang", "die"])
def test_a_broken_rank_fails_its_case_in_time(how: str) -> None:
    group = Ranks(2)
    try:
        assert group.run("tests.cases.harness:sum_of_ranks") == [1.0, 1.0]
        start = time.monotonic()
        with pytest.raises(RankFailure, match=r"(?s)rank 1.*(oh dear|no answer|died)"):
            group.run("tests.cases.harness:break_rank_1", how=how, timeout_s=12)
        assert time.monotonic() - start < 16
        assert group.run("tests.cases.harness:sum_of_ranks") == [1.0, 1.0]
    finally:
        group.stop()
