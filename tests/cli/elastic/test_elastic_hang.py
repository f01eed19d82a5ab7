"""A worker whose main thread hangs in the user's code, while its other threads live on and beat."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from elastic_lsopt.elastic.worker.journal import read_journal
from tests.jobs import TINY, Started, command, in_ranks, losses, write_job

HANG_S = 2.2
SHAPE: dict[str, Any] = {"max_steps": 30, "eval_steps": None, "save_steps": None, "workers": 2, "export": False}


@pytest.mark.timeout(240)
def test_it_is_ended_and_the_others_go_on(tmp_path: Path, ranks: Callable[[int], Any]) -> None:
    """The others' collective fails after ten times HANG_S; then the hung worker does not come to the new generation."""
    hang = tmp_path / "hang"
    hang.touch()
    model = {"import": TINY, "args": {"pause_s": 0.05, "fail_rank": 1, "fail_at": 40, "hang_file": str(hang)}}
    elastic = {"hang_timeout_s": HANG_S, "lease_s": 2.0}
    job = Started(command("none", write_job(tmp_path / "run.yaml", **SHAPE, model=model, elastic=elastic)), tmp_path)
    assert job.wait() == 0, job.output
    assert not hang.exists(), "nobody hung"
    assert "has not come to generation" in job.output, job.output
    changes = read_journal(tmp_path / "run")
    assert any(c["gone"] for c in changes) and all(c["source"] != "checkpoint" for c in changes), changes
    in_ranks(ranks, 2, "job", path=str(write_job(tmp_path / "undisturbed.yaml", **SHAPE)))
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "undisturbed"), rel=1e-5)
