"""Disks and file systems that fail under an agent: full, gone, without locks."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from elastic_lsopt.elastic.agent.node_folder import NodeFolder, addresses
from elastic_lsopt.elastic.agent.vote_disk import AGAIN_S, VoteDisk
from elastic_lsopt.elastic.membership.generation import Generation, Member
from elastic_lsopt.elastic.membership.quorum import Ballot, Vote
from elastic_lsopt.elastic.membership.record import Remembered
from elastic_lsopt.errors import UserError
from tests.elastic.agent.plain_agent import entered

pytestmark = pytest.mark.fast


def until(true: Callable[[], Any], seconds: float = 30.0) -> Any:
    end = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < end, "it never came"
        time.sleep(0.02)
    return found


def fill(folder: Path, name: str) -> Path:
    """From now on every write of this node's votes fails with ENOSPC, by the kernel's own full device."""
    draft = folder / "elastic" / f"{name}.draft"
    draft.symlink_to("/dev/full")
    return draft


@pytest.mark.long
def test_a_worker_dies_while_the_disk_is_full(tmp_path: Path) -> None:
    """The agent lives, its other worker lives; the death becomes a generation as soon as there is room."""
    command = [sys.executable, "-m", "tests.elastic.agent.plain_agent", str(tmp_path), "n", "2"]
    agent = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    said: list[str] = []
    assert agent.stderr is not None
    try:
        until(lambda: len({name for name, *_ in entered(tmp_path)}) == 2)
        number = max(n for _, _, n, _ in entered(tmp_path))
        first, other = {(name, pid) for name, pid, *_ in entered(tmp_path)}
        full = fill(tmp_path, "n")
        os.kill(first[1], signal.SIGKILL)
        for line in iter(agent.stderr.readline, ""):
            said.append(line)
            if "cannot be written" in line:
                break
        time.sleep(2.0)  # well beyond a lease
        assert agent.poll() is None, said
        os.kill(other[1], 0)
        assert max(n for _, _, n, _ in entered(tmp_path)) == number, "a vote that was not written was given"
        full.unlink()
        [after] = until(lambda: [line for line in entered(tmp_path) if line[2] > number])
        assert after == (*other, number + 1, [first[0]])
    finally:
        agent.kill()
        said.append(agent.stderr.read())
        agent.wait(20)
    log = "".join(said)
    assert log.count("cannot be written (No space left on device), so this node gives no vote") == 1, log
    assert log.count("can be written again; this node votes") == 1
    assert "Traceback" not in log


def remembered(number: int) -> Remembered:
    generation = Generation(number, 0, "n", (Member("n", "h:1", ("n/a",)),), "", (), running=True)
    return Remembered("n", 0, generation, Vote(Ballot(0, "n")))


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_small_file_system_runs_full_and_keeps_the_votes_that_it_has(tmp_path: Path) -> None:
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "lso", str(tmp_path)]
    mounted = subprocess.run(command, capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.decode().strip()}")
    try:
        disk = VoteDisk(folder := NodeFolder(tmp_path, "n"))
        assert disk.write(remembered(1), 0.0)
        ballast = tmp_path / "ballast"
        with ballast.open("wb", buffering=0) as out, pytest.raises(OSError, match="No space"):
            while True:
                out.write(bytes(4096))
        assert not disk.write(remembered(2), 1.0) and disk.fault == os.strerror(errno.ENOSPC)
        assert not disk.may_vote(1.0 + AGAIN_S / 2) and disk.may_vote(1.0 + AGAIN_S)
        assert folder.remembered() == remembered(1).to_json()
        ballast.unlink()
        assert disk.write(remembered(2), 2.0) and not disk.fault
        assert folder.remembered() == remembered(2).to_json()
        folder._lock.close()
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EIO, errno.ESTALE, errno.ENOLCK])
def test_a_file_system_without_locks_is_refused_by_name(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(UserError, match=rf"n\.lock cannot be locked: {os.strerror(code)}; .*on Lustre: -o flock"):
        NodeFolder(tmp_path, "n")
    assert [f.name for f in (tmp_path / "elastic").iterdir()] == ["n.lock"]


def test_a_name_that_is_taken_gives_the_next_one(tmp_path: Path) -> None:
    first, second = NodeFolder(tmp_path, "n"), NodeFolder(tmp_path, "n")
    assert (first.name, second.name) == ("n", "n-2")


def test_votes_that_cannot_be_read_are_not_taken_for_none(tmp_path: Path) -> None:
    folder = NodeFolder(tmp_path, "n")
    assert folder.remembered() is None
    (folder.path / "n.json").mkdir()  # reading it fails, and not because it is missing
    with pytest.raises(UserError, match=r"n\.json cannot be read: Is a directory; this node's votes stand there"):
        folder.remembered()


def test_an_address_that_vanishes_or_is_empty_is_none(tmp_path: Path) -> None:
    folder = NodeFolder(tmp_path, "n")
    folder.announce("h:1")
    (folder.path / "gone.address").symlink_to(folder.path / "nowhere")
    (folder.path / "empty.address").touch()
    assert addresses(tmp_path) == ["h:1"]
    full = folder.path / "n.address"
    full.unlink()
    full.symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"n\.address cannot be written: No space left on device"):
        folder.announce("h:1")
