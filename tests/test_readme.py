"""The README's programs run as they stand, and its commands exist."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from tests.docs.blocks import blocks
from tests.processes.ranks import ROOT, rank_environment
from tests.processes.warm import run

README = (ROOT / "README.md").read_text(encoding="utf-8")
PROGRAMS = [block.text for block in blocks("README.md", "python")]


def test_there_is_a_program_for_probes_and_a_face_each() -> None:
    assert [next(f for f in ("LandscapeOptimizer", "initialize", "attach") if f"lso.{f}(" in p) for p in PROGRAMS] == [
        "attach", "LandscapeOptimizer", "initialize", "attach",
    ]  # fmt: skip


@pytest.mark.parametrize("number", range(len(PROGRAMS)))
def test_program_runs(number: int, tmp_path: Path) -> None:
    done = run([sys.executable, "-c", PROGRAMS[number]], cwd=tmp_path, env=rank_environment(), timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    losses = [float(w) for w in re.findall(r"\d\.\d+", done.stdout)]
    assert losses, done.stdout


def test_every_link_leads_somewhere() -> None:
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert set(re.findall(r"^    make ([a-z-]+)", README, re.MULTILINE)) <= targets
