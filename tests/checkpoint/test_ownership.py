"""One job at a time owns a folder: the living keep it, the dead do not, and a job's own next writer takes it over."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from elastic_lsopt.checkpoint import ownership
from elastic_lsopt.checkpoint.ownership import Ownership, owner_of
from elastic_lsopt.errors import UserError
from tests.processes.ranks import ROOT

OTHER = "import sys; from elastic_lsopt.checkpoint.ownership import Ownership; from pathlib import Path"


def owning(folder: Path) -> subprocess.Popen[str]:
    """A process that owns the folder until its input ends."""
    code = f"{OTHER}; Ownership.take(Path({str(folder)!r})); print('own', flush=True); sys.stdin.read()"
    started = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert started.stdout is not None and started.stdout.readline() == "own\n"
    return started


def claim(folder: Path, number: int, **changes: object) -> Path:
    """A claim as a process on another node has written it."""
    told = {"job": "theirs", "host": "node-9", "process": 1, "lives_in": "elsewhere", "born": "1", "beats": 0} | changes
    path = folder / f".owner-{number}.json"
    path.write_text(json.dumps(told))
    return path


def test_the_second_job_is_refused_by_name_until_the_first_is_dead(tmp_path: Path) -> None:
    other = owning(tmp_path)
    try:
        who = f"a job on {socket.gethostname()}, process {other.pid}"
        with pytest.raises(UserError, match=f"{tmp_path} is in use: {who}"):
            Ownership.take(tmp_path)
        assert owner_of(tmp_path) is not None
        other.kill()
        deadline = time.monotonic() + 20
        while Path(f"/proc/{other.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
            assert time.monotonic() < deadline
        begin = time.monotonic()
        mine = Ownership.take(tmp_path)  # nobody has reaped it yet, and yet it is dead
        assert time.monotonic() - begin < ownership.SILENCE_S / 2
    finally:
        other.kill()
        other.wait()
    assert mine.held and [p.name for p in tmp_path.iterdir()] == [".owner-2.json"]
    mine.release()
    assert not list(tmp_path.iterdir()) and owner_of(tmp_path) is None


def test_the_next_writer_of_the_same_job_takes_over_at_once(tmp_path: Path) -> None:
    first = Ownership.take(tmp_path, "job")
    second = Ownership.take(tmp_path, "job")
    assert second.held and not first.held
    first.release()  # its own claim has gone; the other's stays
    assert second.held
    with pytest.raises(UserError, match="is in use"):
        Ownership.take(tmp_path, "another")
    second.leave_to_next()
    third = Ownership.take(tmp_path, "job")
    assert third.held
    third.release()


def test_a_process_number_that_is_used_again_is_not_the_owner(tmp_path: Path) -> None:
    claim(tmp_path, 3, lives_in=ownership._kernel(), process=os.getpid(), born="1")
    mine = Ownership.take(tmp_path)
    assert mine.held
    mine.release()


def test_an_owner_on_another_node_lives_as_long_as_it_beats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ownership, "LOOK_S", 0.05)
    claim(tmp_path, 1)
    said: list[str] = []

    def beat(line: str) -> None:
        said.append(line)
        claim(tmp_path, 1, beats=1)

    with pytest.raises(UserError, match="a job on node-9, process 1"):
        Ownership.take(tmp_path, say=beat)
    assert len(said) == 1 and "node-9" in said[0]
    monkeypatch.setattr(ownership, "SILENCE_S", 1.0)
    begin = time.monotonic()
    mine = Ownership.take(tmp_path)  # it beats no more
    assert 1.0 <= time.monotonic() - begin < 10
    mine.release()


def test_an_owner_that_was_taken_for_dead_finds_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ownership, "BEAT_S", 0.05)
    mine = Ownership.take(tmp_path)
    assert mine.held and not mine.lost
    claim(tmp_path, 7)
    assert not mine.held  # before the next beat, so before a commit
    (tmp_path / ".owner-1.json").unlink()
    deadline = time.monotonic() + 20
    while not mine.lost:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert [p.name for p in tmp_path.iterdir()] == [".owner-7.json"]


def test_of_many_that_find_a_dead_owner_one_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ownership, "LOOK_S", 0.01)
    claim(tmp_path, 1, lives_in=ownership._kernel(), process=os.getpid(), born="1")
    won: list[Ownership] = []
    refused: list[str] = []
    start = threading.Barrier(8)

    def take() -> None:
        start.wait()
        try:
            won.append(Ownership.take(tmp_path))
        except UserError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(won) == 1 and len(refused) == 7 and won[0].held
    won[0].release()
