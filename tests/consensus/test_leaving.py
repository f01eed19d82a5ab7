"""Replicas that are told to stop, leave, or are late for the end: what the others do, and what is there then."""

from __future__ import annotations

import os
import signal
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from elastic_lsopt.elastic.worker.journal import read_meetings
from tests.jobs import TINY, Started, command, rows, run, write_job

STEPS = 24


def job(folder: Path, name: str, **changes: Any) -> Path:
    """Two replicas of a process each, slow enough to be met in the middle, until the file "hurry" is there."""
    model = {"import": TINY, "args": {"pause_s": 0.08, "hurry_file": str(folder / "hurry")}}
    base = {
        "backend": "replicated", "workers": 2, "global_batch_size": 8, "max_steps": STEPS, "eval_steps": None,
        "landscape": {"method": "none"}, "save_steps": 6, "model": model,
        "consensus": {"rule": "easgd", "replicas": 2, "tau": 4},
    }  # fmt: skip
    return write_job(folder / f"{name}.yaml", **{**base, **changes})


def of_rank(started: Started, rank: int) -> int:
    """The process of a rank of `workers:`."""
    wanted = f"RANK={rank}".encode()
    [found] = [
        pid for pid in started.workers()
        if {wanted, b"ELASTIC_LSOPT_CHILD=1"} <= {*Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")}
    ]  # fmt: skip
    return found


def newest(folder: Path) -> int:
    return max(rows(folder), default=0)


def saved(folder: Path) -> set[str]:
    return {path.name for path in (folder / "checkpoints").glob("checkpoint-*")}


def test_one_replica_is_told_to_stop(tmp_path: Path) -> None:
    """It saves and leaves; the other waits for nobody, goes on to the end of the job, and leaves its model."""
    started = Started(command("none", job(tmp_path, "run")), tmp_path)
    folder, other = tmp_path / "run", tmp_path / "run" / "replica-1"
    try:
        started.until(lambda: newest(folder) >= 6)
        os.kill(of_rank(started, 0), signal.SIGTERM)
        (tmp_path / "hurry").touch()
        assert started.wait() == 0, started.output
    finally:
        started.kill()
    assert newest(folder) < STEPS and saved(folder), started.output
    ends = rows(other)
    assert ends[newest(other)]["samples"] == 8 * STEPS
    assert max(row["seconds"] for row in ends.values()) < 8.0, "it has waited for who had left"
    assert (folder / "model" / "model.safetensors").exists(), started.output


@pytest.mark.full
@pytest.mark.parametrize("tau", [4, 8])
def test_all_are_told_to_stop(tmp_path: Path, tau: int) -> None:
    """In the middle of a round they save where they are, and go on from there with the same bits."""
    block = {"rule": "easgd", "replicas": 2, "tau": tau}
    (tmp_path / "hurry").touch()
    run(command("none", job(tmp_path, "whole", consensus=block)), tmp_path)
    (tmp_path / "hurry").unlink()
    file = job(tmp_path, "stopped", consensus=block)
    started = Started(command("none", file), tmp_path)
    folders = [tmp_path / "stopped", tmp_path / "stopped" / "replica-1"]
    try:
        started.until(lambda: min(map(newest, folders)) >= 10)
        started.process.terminate()
        assert started.wait() == 0, started.output
    finally:
        started.kill()
    assert max(map(newest, folders)) < STEPS and "the same command goes on from there" in started.output, started.output
    (tmp_path / "hurry").touch()
    said = run(command("none", file), tmp_path)
    assert "resumed from" in said and "the model is given" not in said
    for here, there in zip([tmp_path / "whole", tmp_path / "whole" / "replica-1"], folders, strict=True):
        assert {s: r["loss"] for s, r in rows(here).items()} == {s: r["loss"] for s, r in rows(there).items()}


def test_who_waits_for_others_hears_that_it_is_to_stop(tmp_path: Path) -> None:
    """The other hangs between two meetings, in its step 6, and the deadline is far."""
    block = {"rule": "easgd", "replicas": 2, "tau": 4, "exchange_timeout_s": 200}
    (hang := tmp_path / "hang").touch()
    model = {"import": TINY, "args": {"fail_rank": 1, "fail_at": 12, "hang_file": str(hang)}}
    started = Started(command("none", job(tmp_path, "run", consensus=block, model=model)), tmp_path)
    folder = tmp_path / "run"
    try:
        started.until(lambda: newest(folder) == 8 and not hang.exists())  # and meets before the next
        time.sleep(1.0)
        os.kill(pid := of_rank(started, 0), signal.SIGTERM)
        began = time.monotonic()
        started.until(lambda: pid not in started.workers())
        assert time.monotonic() - began < 8.0
    finally:
        started.kill()
    assert "stopped after step 8" in started.output and saved(folder), started.output


@pytest.mark.full
def test_who_is_late_for_the_end(tmp_path: Path) -> None:
    """The first replica hangs until the other has ended the job: it is told so, and the model stays the other's."""
    block = {"rule": "easgd", "replicas": 2, "tau": 4, "exchange_timeout_s": 2}
    started = Started(command("none", job(tmp_path, "run", consensus=block, save_steps=None)), tmp_path)
    folder = tmp_path / "run"
    model = folder / "model" / "model.safetensors"
    try:
        started.until(lambda: newest(folder) >= 6)
        (tmp_path / "hurry").touch()
        os.kill(pid := of_rank(started, 0), signal.SIGSTOP)
        started.until(lambda: model.exists() and len(started.workers()) == 1)
        made = model.stat().st_mtime_ns
        os.kill(pid, signal.SIGCONT)
        assert started.wait() == 0, started.output
    finally:
        started.kill()
    assert model.stat().st_mtime_ns == made, "it has written another model over that of the job"
    assert "replica 0 was away when the others ended the job" in started.output, started.output
    ends = rows(folder / "replica-1")
    assert ends[newest(folder / "replica-1")]["samples"] == 8 * STEPS


@pytest.mark.full
def test_a_replica_that_is_killed(tmp_path: Path) -> None:
    """With `workers:` the others go on, and the job ends well."""
    block = {"rule": "easgd", "replicas": 2, "tau": 4, "exchange_timeout_s": 4}
    started = Started(command("none", job(tmp_path, "run", consensus=block)), tmp_path)
    try:
        started.until(lambda: newest(tmp_path / "run") >= 6)
        os.kill(of_rank(started, 0), signal.SIGKILL)
        (tmp_path / "hurry").touch()
        assert started.wait() == 0, started.output
    finally:
        started.kill()
    assert "worker 0 was ended by SIGKILL; replica 0 is no more, the others go on" in started.output
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()


@pytest.mark.full
def test_a_word_of_a_stranger_is_not_believed(tmp_path: Path) -> None:
    """Who writes into the job's store that it is over does not end it well."""
    started = Started(command("none", job(tmp_path, "run")), tmp_path)
    try:
        started.until(lambda: newest(tmp_path / "run") >= 5)
        names = Path(f"/proc/{of_rank(started, 0)}/environ").read_bytes().split(b"\0")
        port = next(int(name.removeprefix(b"MASTER_PORT=")) for name in names if name.startswith(b"MASTER_PORT="))
        store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=20))
        store.set("meetings/over", "1")
        assert started.wait() == 1, started.output
    finally:
        started.kill()
    assert "is not signed with this job's secret; a stranger wrote it" in started.output


@pytest.mark.full
def test_a_job_in_which_nobody_can_help(tmp_path: Path) -> None:
    """All replicas break at once: it ends as any job that has diverged, and not after many rounds."""
    file = job(
        tmp_path, "run", learning_rate=1e18, max_grad_norm=0.0, max_skipped_steps=3, warmup_ratio=0.0,
        consensus={"rule": "easgd", "replicas": 2, "tau": 10}, max_steps=200,
    )  # fmt: skip
    (tmp_path / "hurry").touch()
    said = run(command("none", file), tmp_path, code=2)
    assert said.count("the job has diverged: ") == 1 and "Traceback" not in said, said
    assert newest(tmp_path / "run") < 25, said


@pytest.mark.full
def test_fewer_replicas_and_then_more(tmp_path: Path) -> None:
    """4, 2, 4: it goes on from the end of the two, not from an older checkpoint that all four have."""
    (tmp_path / "hurry").touch()
    file = job(tmp_path, "run")

    def of(replicas: int, steps: int) -> str:
        more = [f"workers={replicas}", f"max_steps={steps}"]
        block = f"consensus={{rule: easgd, replicas: {replicas}, tau: 4}}"
        return run(command("none", file, block, *more), tmp_path)

    of(4, 12)
    of(2, 24)
    said = of(4, 36)
    assert "checkpoint-24" in said and "the model is given to replicas 2, 3" in said, said


@pytest.mark.full
def test_replicas_of_another_run(tmp_path: Path) -> None:
    """`resume_from_checkpoint: none` sets aside also those that the new run has not; so later ones are none of its."""
    (tmp_path / "hurry").touch()
    file = job(tmp_path, "run")
    four = ["workers=4", "consensus={rule: easgd, replicas: 4, tau: 4}"]
    run(command("none", file, *four), tmp_path)
    run(command("none", file, "resume_from_checkpoint=none"), tmp_path)
    folder = tmp_path / "run"
    assert not (folder / "replica-2").exists() and (folder / "earlier-1" / "replica-3" / "checkpoints").exists()
    assert (folder / "replica-1" / "earlier-1" / "checkpoints").exists()
    said = run(command("none", file, *four, "max_steps=36"), tmp_path)
    assert "the model is given to replicas 2, 3" in said, said
    assert next(m["fit"] for m in read_meetings(folder)) == [0, 1]
