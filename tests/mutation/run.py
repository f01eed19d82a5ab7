"""Each mutant of mutants.json against the tests that run its line; what has been judged is not judged again.

    python -m tests.mutation.run [--limit-s 300] [--at-most N] [--only TEXT] [--again]

    killed       a test failed, which passes without the mutant
    survived     every test that runs the line passed
    unfinished   nothing failed within the limit, and not all had their turn
    no test      nothing runs the line
    unjudged     pytest itself failed, with the mutant and without

The exit code is 1 where fewer than 90 of 100 were killed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.mutation.contexts import ROOT, Contexts, at_import
from tests.mutation.coverage_run import DATA
from tests.mutation.draw import Mutant, read
from tests.mutation.mistakes import mistakes

RESULTS = Path(__file__).parent / "results.json"
SHARE = 0.9
TEST_TIMEOUT_S = 120
"""A mutant may make a test hang: that is noticing too."""
FAILED = re.compile(r"^(?:FAILED|ERROR) (tests/.+?)(?: - .*)?$", re.M)


class Tree:
    """A copy of the checkout in which one file at a time is changed."""

    def __init__(self) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="mutation-"))
        listed = ["git", "ls-files", "-co", "--exclude-standard", "-z"]
        for name in filter(None, subprocess.check_output(listed, cwd=ROOT, text=True).split("\0")):
            if (ROOT / name).is_file():
                (self.root / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, self.root / name)

    def change(self, mutant: Mutant) -> int:
        """Put the mutant in; returns the line on which its statement begins."""
        source = (ROOT / mutant.path).read_text(encoding="utf-8")
        line = mutant.line_in(source)
        assert line is not None
        lines = source.splitlines()
        lines[line - 1] = mutant.after
        (self.root / mutant.path).write_text("\n".join(lines) + "\n", encoding="utf-8")
        return next((m.statement for m in mistakes(source) if (m.line, m.after) == (line, mutant.after)), line)

    def restore(self, mutant: Mutant) -> None:
        shutil.copy2(ROOT / mutant.path, self.root / mutant.path)

    def failing(self, tests: Sequence[str], limit_s: float) -> tuple[str | None, bool]:
        """The first of the tests that fails ("" for what kept all of them from running), and whether all had a turn."""
        plain = [
            "-o", "addopts=", "-p", "no:cacheprovider", "-x", "-q", "-rfE", f"--timeout={TEST_TIMEOUT_S}",
            "-m", "not full",
        ]  # fmt: skip
        command = [sys.executable, "-m", "pytest", *plain, *tests]
        with subprocess.Popen(
            command, cwd=self.root, env={**os.environ, "PYTHONPATH": str(self.root), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        ) as process:  # fmt: skip
            try:
                said, _ = process.communicate(timeout=limit_s)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
                return None, False
        if process.returncode in (0, 5):  # 5: all were skipped
            return None, True
        named = FAILED.findall(said)
        return (named[0] if named else ""), False

    def remove(self) -> None:
        shutil.rmtree(self.root, ignore_errors=True)


def judge(tree: Tree, mutant: Mutant, contexts: Contexts, limit_s: float) -> dict[str, Any]:
    """What became of a mutant, and by which test."""
    begin = time.monotonic()
    line = tree.change(mutant)
    tests = contexts.tests(mutant.path, line)
    if at_import((ROOT / mutant.path).read_text(encoding="utf-8"), line):
        tests = [f"tests/{Path(mutant.path).parts[1]}", *tests]
    outcome, by, left = "no test" if not tests else "survived", "", list(tests)
    try:
        while left:
            failed, finished = tree.failing(left, limit_s - (time.monotonic() - begin))
            if failed is None:
                outcome = "survived" if finished else "unfinished"
                break
            tree.restore(mutant)
            if tree.failing([failed] if failed else left[:1], limit_s) == (None, True):
                outcome, by = "killed", failed or "the import"
                break
            if not failed:
                outcome = "unjudged"
                break
            # It fails without the mutant too, and says nothing of it.
            left = [t for t in left if t != failed.partition("[")[0]]
            tree.change(mutant)
    finally:
        tree.restore(mutant)
    return {**asdict(mutant), "outcome": outcome, "by": by, "tests": len(tests),
            "seconds": round(time.monotonic() - begin, 1)}  # fmt: skip


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutation.run")
    parser.add_argument("--limit-s", type=float, default=300.0, help="for one mutant")
    parser.add_argument("--at-most", type=int, help="mutants in this call")
    parser.add_argument("--only", default="", help="mutants whose path or line holds this text")
    parser.add_argument("--again", action="store_true", help="forget what was judged")
    asked = parser.parse_args(arguments)
    if not DATA.exists():
        print("no coverage: run python -m tests.mutation.coverage_run tests first.", file=sys.stderr)
        return 2
    mutants, known = read(), [] if asked.again or not RESULTS.exists() else json.loads(RESULTS.read_text())
    results = {Mutant(**{k: r[k] for k in ("path", "nth", "before", "after")}): r for r in known}
    results = {m: results[m] for m in mutants if m in results}
    due = [m for m in mutants if m not in results and asked.only in m.name][: asked.at_most]
    tree, contexts = Tree(), Contexts(DATA)
    try:
        for mutant in due:
            source = (ROOT / mutant.path).read_text(encoding="utf-8") if (ROOT / mutant.path).exists() else ""
            if mutant.line_in(source) is None:
                print(f"gone        {mutant.name}: draw again", flush=True)
                continue
            results[mutant] = told = judge(tree, mutant, contexts, asked.limit_s)
            ordered = [results[m] for m in mutants if m in results]
            RESULTS.write_text(json.dumps(ordered, indent=1) + "\n", encoding="utf-8")
            print(f"{told['outcome']:<11} {told['seconds']:6.1f} s  {mutant.name}  {told['by']}", flush=True)
    finally:
        tree.remove()
    counts = Counter(r["outcome"] for r in results.values())
    print(f"{len(results)} of {len(mutants)} judged: {', '.join(f'{n} {k}' for k, n in counts.most_common())}")
    return int(counts["killed"] < SHARE * len(results))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
