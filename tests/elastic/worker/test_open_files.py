"""Open files: what a group costs, the limit that is raised, and the refusal before a group would fail."""

from __future__ import annotations

import resource
import subprocess
import sys
from typing import Any

import pytest

from elastic_lsopt.elastic.worker.open_files import GROUPS, files_of_a_rank, too_few


@pytest.mark.fast
def test_a_group_costs_a_socket_for_each_rank(ranks: Any) -> None:
    for r in ranks(3).run("tests.cases.elastic.open_files:count", kind="fsdp2"):
        assert r == {"two_groups": 2 * 3, "engine": 0}
    assert files_of_a_rank(100) - files_of_a_rank(0) == GROUPS * 100
    assert files_of_a_rank(100, deepspeed=True, cuda=True) - files_of_a_rank(0) == (GROUPS + 2) * 100


@pytest.mark.fast
def test_a_thousand_files_are_too_few_for_three_hundred_ranks() -> None:
    assert not too_few(290, 1024) and not too_few(10**6, resource.RLIM_INFINITY)
    assert too_few(300, 1024).startswith("300 ranks need about 1,050 open files each")
    assert "the limit here is 1,024; raise it (ulimit -Hn" in too_few(230, 1024, deepspeed=True)


@pytest.mark.fast
def test_the_limit_is_raised_as_far_as_it_may_and_then_it_is_refused() -> None:
    program = (
        "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (200, 400))\n"
        "from elastic_lsopt.elastic.worker.open_files import refuse_too_few\n"
        "refuse_too_few(80); print(resource.getrlimit(resource.RLIMIT_NOFILE))\n"
        "try: refuse_too_few(84)\n"
        "except Exception as error: print(type(error).__name__, error)\n"
    )
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert said.startswith("(400, 400)\nUserError 84 ranks need about 402 open files each"), said
