"""docs/trainer.md: its programs run as they stand, one after another."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from tests.docs.blocks import program
from tests.processes.ranks import rank_environment
from tests.processes.warm import run


def test_the_pages_programs_run(tmp_path: Path) -> None:
    done = run([sys.executable, "-c", program("docs/trainer.md")], cwd=tmp_path, env=rank_environment(), timeout=180)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 passes a step, loss" in done.stdout
    sharpest = re.findall(r"sharpest: \[(.*)\]", done.stdout)
    assert len(sharpest[0].split(",")) == 2
