"""Which test runs which line, also in the processes that tests start: a plugin for coverage.py, and its answers.

A line is run for the function under `tests` that called it: a test, or a case inside a rank. A process that a test has
started by a command has neither, and is run for the test that pytest names in the environment.
"""

from __future__ import annotations

import ast
import os
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from coverage import CoverageData, CoveragePlugin

ROOT = Path(__file__).resolve().parents[2]
TESTS = f"{os.sep}tests{os.sep}"
CASES = f"{TESTS}cases{os.sep}"
MODULE = r"(tests\.cases(?:\.\w+)+|benchmarks(?:\.\w+)+)"
CASE, OF_ONE_MODULE = re.compile(rf'"{MODULE}:(\w+)"'), re.compile(rf'^CASES = "{MODULE}:"$', re.M)


class WhoAsks(CoveragePlugin):
    """Names the context of what a frame calls; None leaves the one there is."""

    def dynamic_context(self, frame: FrameType) -> str | None:
        path, name = frame.f_code.co_filename, frame.f_code.co_name
        if name.startswith("test_") and TESTS in path:
            return f"tests/{path.rpartition(TESTS)[2]}::{name}"
        if CASES in path and frame.f_back is not None and CASES not in frame.f_back.f_code.co_filename:
            module = path.rpartition(CASES)[2].removesuffix(".py").replace(os.sep, ".")
            return f"tests.cases.{module}:{name}"
        if name == "main" and path.endswith(os.path.join("elastic_lsopt", "cli", "main.py")):
            return os.environ.get("PYTEST_CURRENT_TEST", "").partition("[")[0].partition(" ")[0] or None
        return None


def coverage_init(reg: Any, options: Mapping[str, Any]) -> None:
    reg.add_dynamic_context(WhoAsks())


class Contexts:
    """The tests by line, read from a data file of coverage.py."""

    def __init__(self, data_file: Path) -> None:
        self._data = CoverageData(str(data_file))
        self._data.read()
        self._files = {
            Path(name).as_posix().rpartition("elastic_lsopt/")[2]: name for name in self._data.measured_files()
        }
        self._of_case = by_case()
        self._sizes = self._count()

    def _count(self) -> dict[str, int]:
        """Lines that each context runs: a small one is a test that says more about its lines, and takes less long."""
        sizes: dict[str, int] = defaultdict(int)
        for name in self._files.values():
            for contexts in self._data.contexts_by_lineno(name).values():
                for context in contexts:
                    sizes[context] += 1
        return sizes

    def tests(self, path: str, line: int) -> list[str]:
        """The tests that run a line of a file of the package, those that run least else first; none: []."""
        name = self._files.get(path.removeprefix("elastic_lsopt/"))
        contexts = self._data.contexts_by_lineno(name).get(line, []) if name is not None else []
        out: dict[str, None] = {}
        for context in sorted(filter(None, contexts), key=lambda c: (self._sizes[c], c)):
            out |= dict.fromkeys([context] if "::" in context else sorted(self._of_case.get(context, ())))
        return list(out)


def at_import(source: str, line: int) -> bool:
    """Whether a line runs when its module is imported, for nobody in particular: the defaults of a class, say."""
    functions = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    return not any(f.body[0].lineno <= line <= (f.end_lineno or 0) for f in functions)


def by_case(tests: Path = ROOT / "tests") -> dict[str, set[str]]:
    """The test functions in whose text a case is named; a whole file where it is named outside of them."""
    out: dict[str, set[str]] = defaultdict(set)
    for path in tests.rglob("test_*.py"):
        function, text = "", path.read_text(encoding="utf-8")
        if said_once := OF_ONE_MODULE.search(text):
            text = text.replace('CASES + "', f'"{said_once[1]}:')
        for line in text.splitlines():
            if line[:1].strip():
                begins = re.match(r"def (test_\w+)", line)
                function = f"::{begins[1]}" if begins else function if line.startswith(")") else ""
            for module, name in CASE.findall(line):
                out[f"{module}:{name}"].add(f"{path.relative_to(tests.parent).as_posix()}{function}")
    return out
