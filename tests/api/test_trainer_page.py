"""docs/trainer.md: its programs run as they stand, one after another, and its links lead somewhere."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from tests.processes.ranks import ROOT, rank_environment
from tests.processes.warm import run

PAGE = (ROOT / "docs" / "trainer.md").read_text(encoding="utf-8")
PROGRAMS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def test_the_pages_programs_run(tmp_path: Path) -> None:
    done = run([sys.executable, "-c", "\n".join(PROGRAMS)], cwd=tmp_path, env=rank_environment(), timeout=180)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 passes a step, loss" in done.stdout and len(PROGRAMS) == 4
    sharpest = re.findall(r"sharpest: \[(.*)\]", done.stdout)
    assert len(sharpest[0].split(",")) == 2


def test_its_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)]+)\)", PAGE):
        assert (ROOT / "docs" / target).exists(), target
