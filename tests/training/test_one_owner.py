"""Two jobs never write into one run folder, and what a job said last of itself is what `status` tells."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from elastic_lsopt.checkpoint.ownership import Ownership
from elastic_lsopt.cli.status import state_line, status
from elastic_lsopt.training.reporting.run_state import RunState
from tests.jobs import Run, in_ranks, write_job


def test_the_second_job_in_a_folder_is_refused_before_it_changes_anything(ranks: Any, run: Run, folder: Path) -> None:
    job, busy = write_job(folder / "busy.yaml", max_steps=2, eval_steps=None, export=False), folder / "busy"
    first = Ownership.take(busy)
    for overrides in ([], ["resume_from_checkpoint=none"]):
        for said in in_ranks(ranks, 2, "refused", path=str(job), overrides=overrides):
            assert said.startswith(f"{busy} is in use: a job on ") and f"process {os.getpid()}, writes there" in said
    assert [path.name for path in busy.iterdir()] == [".owner-1.json"]
    first.release()
    assert run(2, job)["step"] == 2
    assert not list(busy.glob(".owner*"))


def test_status_of_a_job_without_agents(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert state_line(tmp_path) is None
    state = RunState(tmp_path)
    state.say("stopped", 40, 80)
    assert status(tmp_path, endpoint=None, secret_file=None, once=True) == 0
    assert capsys.readouterr().out == "stopped after step 40 of 80\n"
    assert [path.name for path in tmp_path.iterdir()] == ["state.json"]
    state.say("failed", 41, 80, "the job has diverged")
    assert state_line(tmp_path) == "failed after step 41 of 80: the job has diverged"

    state.say("running", 42, 80)
    owner = Ownership.take(tmp_path)
    line = state_line(tmp_path)
    assert line is not None and line.startswith("running after step 42 of 80, said at 2")
    assert line.endswith(f"by process {os.getpid()}")
    owner.release()
    code = f"from elastic_lsopt.checkpoint.ownership import *; Ownership.take(Path({str(tmp_path)!r}))"
    subprocess.run([sys.executable, "-c", code], check=True)
    line = state_line(tmp_path)
    assert line is not None and "its process has gone" in line
