"""A YAML file's job of replicas whose workers come and go: healed inside, lost whole and given the model, stopped."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from elastic_lsopt.elastic.worker.journal import read_journal, read_meetings
from tests.jobs import TINY, Started, command, rows, write_job

STEPS = 72
SHAPE: dict[str, Any] = {
    "max_steps": STEPS, "eval_steps": None, "save_steps": 12, "backend": "fsdp2", "workers": 4, "global_batch_size": 16,
    "elastic": {"respawn": True}, "consensus": {"rule": "easgd", "replicas": 2, "tau": 4},
}  # fmt: skip


def last(folder: Path) -> dict[str, Any]:
    found = rows(folder)
    return dict(found[max(found)]) if found else {"step": 0, "samples": 0}


def of_replica(started: Started, run: Path, number: int) -> list[int]:
    """The processes of a replica's workers, by its newest generation."""
    names = [change for change in read_journal(run) if change["replica"] == number][-1]["workers"]
    return [pid for name, pid in started.named_workers().items() if name in names]


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    "killed", [pytest.param(1, marks=pytest.mark.full), 2], ids=["one worker of two", "the whole replica"]
)
def test_a_replica_loses_workers(tmp_path: Path, killed: int) -> None:
    run, hurry = tmp_path / "run", tmp_path / "hurry"
    slow = {"import": TINY, "args": {"pause_s": 0.15, "hurry_file": str(hurry)}}
    started = Started(command("none", write_job(tmp_path / "run.yaml", **SHAPE, model=slow)), tmp_path)

    def healed() -> bool:
        """From memory, or as a newcomer that has been given the model where all meet."""
        if killed == 1:
            return read_journal(run)[known:] != []
        return any(m["fit"] == [0] and m["members"] == [0, 1] and m["well"] for m in read_meetings(run))

    try:
        started.until(lambda: min(last(run)["step"], last(run / "replica-1")["step"]) >= 6)
        known = len(read_journal(run))
        pids = of_replica(started, run, 1)
        assert len(pids) == 2, (pids, started.output)
        for how in (signal.SIGSTOP, signal.SIGKILL):  # nobody hands on what he has between two deaths
            for pid in pids[:killed]:
                os.kill(pid, how)
        started.until(healed)
        hurry.touch()
        assert started.wait() == 0, started.output
    finally:
        started.kill()
    first, second = rows(run), rows(run / "replica-1")
    assert sorted(first) == list(range(1, max(first) + 1)), "replica 0 took every step"
    assert {row["generation"] for row in first.values()} and max(r["seconds"] for r in first.values()) < 5.0
    assert last(run)["samples"] == 16 * STEPS, (last(run), started.output)
    changes, met = [c for c in read_journal(run) if c["replica"] == 1], read_meetings(run)
    if killed == 1:
        assert changes[-1]["source"] == "memory", changes
    else:
        assert any(change["source"] == "newcomer" for change in changes), changes
        assert healed(), met
    assert len(second) > 10 and (run / "model").exists()
