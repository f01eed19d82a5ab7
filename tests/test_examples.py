"""Each example runs in under a minute and says what it claims."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.ranks import ROOT, rank_environment


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=lambda p: p.name)
def test_example(example: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(example)], check=False, cwd=ROOT, env=rank_environment(), capture_output=True, text=True,
        timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    if example.name == "own_method.py":
        plain, own, sam = done.stdout.splitlines()
        assert "passes a step 1" in plain and "passes a step 1" in own and "passes a step 2" in sam
        assert all(float(line.rsplit(" ", 1)[1]) > 0.85 for line in (plain, own, sam))
