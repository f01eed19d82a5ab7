"""Commands and a user's own scripts end with their own exit code, not with an abort after all work is done."""

from __future__ import annotations

import json
import subprocess
import sys

from tests.processes.ranks import ROOT, rank_environment

PAIRS = 2
ABORTS_AT_THE_END = """
import atexit, os, sys
from elastic_lsopt.cli import main
class Aborts:
    def __del__(self, abort=os.abort):
        abort()
aborts = Aborts()
atexit.register(print, "handled")
main.command(["validate", "no.yaml"])
"""
"""What an interpreter's end does to a gloo thread, made certain: it takes apart an object that must not be."""


def test_scripts_over_gloo_end_with_zero() -> None:
    """Without the wait at the interpreter's end about one exit in five is an abort (134)."""
    ended = subprocess.run(
        [sys.executable, "-m", "tests.cases.elastic.exits", str(PAIRS)], cwd=ROOT, env=rank_environment(), text=True,
        capture_output=True, timeout=170, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert json.loads(ended.stdout) == {"0": 2 * PAIRS}, ended.stderr[-2000:]


def test_a_command_ends_with_its_own_code_whatever_the_interpreters_end_would_do() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", ABORTS_AT_THE_END], cwd=ROOT, env=rank_environment(), text=True, capture_output=True,
        timeout=60, check=False,
    )  # fmt: skip
    assert ended.returncode == 2 and ended.stdout == "handled\n", ended
    assert ended.stderr.startswith("elastic-lsopt: ") and ended.stderr.count("\n") == 1, ended.stderr


def test_an_output_that_cannot_be_written_is_a_failure() -> None:
    code = "import sys\nfrom elastic_lsopt.backends.fabric.ending import leave\nprint('told')\nleave(0)"
    with open("/dev/full", "w") as full:
        ended = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env={**rank_environment(), "PYTHONUNBUFFERED": ""}, text=True,
            stdout=full, stderr=subprocess.PIPE, timeout=60, check=False,
        )  # fmt: skip
    assert ended.returncode == 1
    assert ended.stderr == "elastic-lsopt: the output could not be written: No space left on device.\n"
