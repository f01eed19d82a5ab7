"""What the suite covers, as one committed list: each test with the values of its axes (law, backend, world, setting).

    python -m tests.manifest            write tests/manifest.txt and elastic_lsopt/tested.json     (make manifest)
    python -m tests.manifest --check    1 where the tests differ from them                         (.ci/run)

So a test or a value that goes is a line that goes, in the same commit. `tested.json` is what `elastic-lsopt methods`
shows under "tested": see tests/tested.py.
"""

from __future__ import annotations

import contextlib
import difflib
import io
import sys
from pathlib import Path
from typing import Any

import pytest

from elastic_lsopt.cli.methods import TESTED
from tests.tested import tested_text

FILE = Path(__file__).with_name("manifest.txt")
LONGEST = 48


class Collected:
    """A plugin that keeps what pytest has collected."""

    def __init__(self) -> None:
        self.items: list[pytest.Item] = []

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.items = list(session.items)


def lines_of(items: list[pytest.Item]) -> list[str]:
    """A line a test: its name, how many cases it has in `make test` and in all, and each axis with its values."""
    tests: dict[str, list[pytest.Item]] = {}
    for item in items:
        tests.setdefault(item.nodeid.partition("[")[0], []).append(item)
    lines = []
    for name, cases in sorted(tests.items()):
        axes: dict[str, dict[str, None]] = {}
        for case in cases:
            parameters = case.callspec.params if hasattr(case, "callspec") else {}
            for axis, value in parameters.items():
                axes.setdefault(axis, {})[_short(value)] = None
        daily = sum(case.get_closest_marker("full") is None for case in cases)
        told = [f"{axis}: {', '.join(sorted(values))}" for axis, values in sorted(axes.items())]
        lines.append("; ".join([f"{name} {daily} {len(cases)}", *told]))
    return lines


def _short(value: Any) -> str:
    text = getattr(value, "__name__", None) or (value.name if isinstance(value, Path) else str(value))
    return " ".join(text.split())[:LONGEST] if " at 0x" not in text else type(value).__name__


def collect() -> list[pytest.Item]:
    found = Collected()
    with contextlib.redirect_stdout(io.StringIO()) as said:
        code = pytest.main(["tests", "--collect-only", "-q"], plugins=[found])
    if code != pytest.ExitCode.OK:
        raise SystemExit(said.getvalue()[-3000:])
    return found.items


def main(check: bool) -> int:
    items = collect()
    fresh = {FILE: "".join(f"{line}\n" for line in lines_of(items)), TESTED: tested_text(items)}
    if not check:
        for path, text in fresh.items():
            path.write_text(text)
        return 0
    stale = {path: text for path, text in fresh.items() if path.read_text() != text}
    for path, text in stale.items():
        known = path.read_text().splitlines(True)
        sys.stdout.writelines(difflib.unified_diff(known, text.splitlines(True), path.name, "the tests", n=0))
        print(f"The tests are not those of {path.name}: run `make manifest`, and commit what goes with its reason.")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv))
