"""`pytest --results FILE`: each test that has passed is noted, and left out by the next call on the same commit."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent


class Results:
    """A line a test in a file: the commit, the test, how it ended, its seconds."""

    def __init__(self, file: Path, writes: bool) -> None:
        self._file, self._writes = file, writes
        ask = ["git", "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(ask, cwd=ROOT, capture_output=True, text=True, check=False)
        self.commit = commit.stdout.strip() or "unknown"

    def passed(self) -> set[str]:
        """The tests of this commit that have passed or were skipped."""
        if not self._file.exists():
            return set()
        rows = [json.loads(line) for line in self._file.read_text().splitlines() if line.endswith("}")]
        ended = {row["test"]: row["outcome"] for row in rows if row["commit"] == self.commit}
        return {test for test, outcome in ended.items() if outcome != "failed"}

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        done = self.passed()
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid in done])
        items[:] = [item for item in items if item.nodeid not in done]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if self._writes and (report.when == "call" or report.outcome != "passed"):
            row: dict[str, Any] = {"commit": self.commit, "test": report.nodeid, "outcome": report.outcome}
            with self._file.open("a") as out:
                out.write(json.dumps(row | {"seconds": round(report.duration, 2)}) + "\n")
