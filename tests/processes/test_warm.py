"""Forked processes are what executed ones are, as far as a test or the system can see."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.processes.ranks import rank_environment
from tests.processes.warm import Popen, is_server

TELL = """
import json, os, random, sys
print(json.dumps({
    "argv": sys.argv, "folder": os.getcwd(), "mine": os.environ.get("MINE"), "own": os.getpid(), "parent": os.getppid(),
    "session": os.getsid(0), "torch": "torch" in sys.modules, "name": __name__, "draw": random.random(),
}))
"""
PARENT = """
import subprocess, sys, os
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], start_new_session=True)
print(child.pid, os.getpid(), flush=True)
sys.exit(child.wait())
"""
WAIT = "import os, time; print(os.getpid(), os.getppid(), flush=True); time.sleep(60)"


def tells(*words: str, **more: Any) -> dict[str, Any]:
    process = Popen([*words], stdout=subprocess.PIPE, env=rank_environment(MINE="Ω=1"), text=True, **more)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    return {"pid": process.pid, **json.loads(said)}


@pytest.mark.parametrize("how", ["-c", "-m", "file"])
def test_what_it_is(how: str, tmp_path: Path) -> None:
    (tmp_path / "tell_of_it.py").write_text(TELL)
    first = {"-c": ["-c", TELL], "-m": ["-m", "tell_of_it"], "file": ["tell_of_it.py"]}[how]
    told, again = (
        tells(sys.executable, "-W", "ignore", *first, "a", "b c", cwd=tmp_path, start_new_session=True) for _ in "12"
    )
    assert told["argv"][1:] == ["a", "b c"] and told["folder"] == str(tmp_path) and told["mine"] == "Ω=1"
    assert told["own"] == told["session"] == told["pid"] and told["name"] == "__main__"
    assert told["torch"], "it was executed"
    assert told["draw"] != again["draw"]


def test_proc_shows_it(tmp_path: Path) -> None:
    with (tmp_path / "said").open("wb") as out:
        process = Popen([sys.executable, "-c", WAIT, "word"], env=rank_environment(MINE="here"), stdout=out)
    while not (tmp_path / "said").read_text().endswith("\n"):
        time.sleep(0.01)
    assert Path(f"/proc/{process.pid}/cmdline").read_bytes().rstrip(b"\0").split(b"\0")[1:] == [
        b"-c", WAIT.encode(), b"word",
    ]  # fmt: skip
    assert b"MINE=here" in Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0")
    assert process.poll() is None and not is_server(process.pid)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=10) == -signal.SIGTERM == process.poll()


@pytest.mark.parametrize("code,ends", [("import sys; sys.exit(7)", 7), ("raise ValueError('oh dear')", 1)])
def test_how_it_ends(code: str, ends: int) -> None:
    process = Popen([sys.executable, "-c", code], env=rank_environment(), stderr=subprocess.PIPE, text=True)
    _, said = process.communicate(timeout=60)
    assert process.returncode == ends and ("ValueError: oh dear" in said) == (ends == 1)


def test_its_workers_are_its_children() -> None:
    process = Popen([sys.executable, "-c", PARENT, WAIT], env=rank_environment(), stdout=subprocess.PIPE, text=True)
    assert process.stdout
    lines = [[int(n) for n in process.stdout.readline().split()] for _ in "12"]
    (child, parent), (same_child, same_parent) = sorted(lines, key=lambda pair: pair != [pair[0], process.pid])
    assert child == same_child and parent == same_parent == process.pid
    os.kill(child, signal.SIGKILL)
    assert process.wait(timeout=10) == 256 - signal.SIGKILL


def test_what_imports_would_have_read_is_executed() -> None:
    code = "import sys; sys.exit('torch' in sys.modules)"
    environment = rank_environment(HF_HUB_OFFLINE="1")
    assert Popen([sys.executable, "-c", code], env=environment).wait(timeout=60) == 0
