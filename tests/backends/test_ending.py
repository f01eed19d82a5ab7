"""Commands and a user's own scripts end with their own exit code, not with an abort after all work is done."""

from __future__ import annotations

import json
import subprocess
import sys

from tests.ranks import ROOT, rank_environment

PAIRS = 10


def test_scripts_over_gloo_end_with_zero() -> None:
    """Without the wait at the interpreter's end about one exit in five is an abort (134)."""
    ended = subprocess.run(
        [sys.executable, "-m", "tests.cases.exits", str(PAIRS)], cwd=ROOT, env=rank_environment(), text=True,
        capture_output=True, timeout=170, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert json.loads(ended.stdout) == {"0": 2 * PAIRS}, ended.stderr[-2000:]
