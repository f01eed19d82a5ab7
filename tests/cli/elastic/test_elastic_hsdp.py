"""A living job on HSDP whose world its replica groups do not always divide: they share one copy then, and say so."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from elastic_lsopt.elastic.worker.journal import read_journal
from tests.jobs import TINY, Started, command, in_ranks, losses, rows, write_job

SHAPE: dict[str, Any] = {"max_steps": 40, "eval_steps": None, "save_steps": None, "workers": 2, "export": False}


@pytest.mark.timeout(240)
def test_a_kill_breaks_the_groups_and_a_join_mends_them(tmp_path: Path, ranks: Callable[[int], Any]) -> None:
    alone, run = tmp_path / "alone", tmp_path / "run"  # whoever comes in the dead one's place waits for the other
    model = {"import": TINY, "args": {"pause_s": 0.06, "held_from": 3, "held_file": str(alone)}}
    job = write_job(tmp_path / "run.yaml", **SHAPE, model=model, elastic={}, fsdp_replicas=2)
    started = Started(command("none", job), tmp_path)
    started.until(lambda: bool(rows(run)) and rows(run)[max(rows(run))]["world"] == 2 and max(rows(run)) >= 4)
    os.kill(next(iter(started.named_workers().values())), signal.SIGKILL)
    started.until(lambda: rows(run)[max(rows(run))]["world"] == 1)
    alone.touch()
    assert started.wait() == 0, started.output
    assert "fsdp_replicas=2 does not divide 1 workers" in started.output, started.output
    changes = read_journal(run)
    assert {row["world"] for row in rows(run).values()} == {1, 2} and changes[-1]["source"] == "memory", changes
    in_ranks(ranks, 2, "job", path=str(write_job(tmp_path / "undisturbed.yaml", **SHAPE)))
    assert losses(run) == pytest.approx(losses(tmp_path / "undisturbed"), rel=1e-5)
