"""Is the suite green, and how long does it take? `make test` again and again, some runs beside a busy core.

    python -m benchmarks.suite                                          five runs of `make test`, two beside a busy core
    python -m benchmarks.suite --target test-fast --runs quiet

Each run is a line of results/suite.jsonl when it has ended, so a series that is stopped has what it has.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.machine import ROOT, commit, describe

RESULTS = ROOT / "benchmarks" / "results" / "suite.jsonl"
RUNS = ("quiet", "busy", "quiet", "busy", "quiet")
LIMIT_S = {"test": 12 * 60, "test-fast": 45}
COUNTS = re.compile(r"(\d+) (passed|failed|skipped|errors?)\b")


@contextmanager
def beside(what: str) -> Iterator[None]:
    """`busy`: another process takes what it can get of one core."""
    if what == "quiet":
        yield
        return
    computes = "import os; parent = os.getppid()\nwhile os.getppid() == parent: pass"
    with subprocess.Popen([sys.executable, "-c", computes]) as process:
        try:
            yield
        finally:
            process.kill()


def once(target: str, what: str) -> dict[str, Any]:
    """One run of a target of the Makefile, as a line of the results."""
    line = {
        "target": target,
        "beside": what,
        "commit": commit(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    load, begin = round(os.getloadavg()[0], 1), time.perf_counter()
    with beside(what):
        done = subprocess.run(["make", target], cwd=ROOT, capture_output=True, text=True, check=False)
    seconds = round(time.perf_counter() - begin, 1)
    counts = {name: int(number) for number, name in COUNTS.findall(done.stdout.splitlines()[-1] if done.stdout else "")}
    failures = re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.M)
    if done.returncode:
        (RESULTS.parent.parent / "suite-failed.log").write_text(done.stdout + done.stderr)
    machine = {key: describe()[key] for key in ("device", "cores", "python", "torch")}
    return {
        **line,
        "seconds": seconds,
        "code": done.returncode,
        **counts,
        "failures": failures,
        "load_before": load,
        **machine,
    }


def suite_table(results: Path) -> str:
    """The newest commit's runs of each target, for the README of the results."""
    if not results.exists():
        return "## the suite\n\nUnproved: no run has been committed.\n"
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    table = [
        "## the suite",
        "",
        "`python -m benchmarks.suite`: the runs of the newest commit; busy: beside a process that takes what it can of "
        "one core.",
        "",
        "| target | beside | seconds | limit | passed | failed | skipped | commit, machine |",
        "| --- | --- | ---: | ---: | ---: | --- | ---: | --- |",
    ]  # fmt: skip
    for target in dict.fromkeys(line["target"] for line in lines):
        mine = [line for line in lines if line["target"] == target]
        for line in mine:
            if line["commit"] == mine[-1]["commit"]:
                table.append(
                    f"| make {target} | {line['beside']} | {line['seconds']:.0f} | {LIMIT_S.get(target, '-')} | "
                    f"{line.get('passed', 0)} | {', '.join(line['failures']) or 'none'} | {line.get('skipped', 0)} | "
                    f"{line['commit']}, {line['cores']} cores, {line['device']} |"
                )
    return "\n".join([*table, ""])


def main() -> int:
    """Exit code 1 where a run failed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--target", choices=sorted(LIMIT_S), default="test")
    parser.add_argument("--runs", nargs="+", choices=("quiet", "busy"), default=RUNS)
    arguments = parser.parse_args()
    failed = 0
    for what in arguments.runs:
        line = once(arguments.target, what)
        failed += line["code"] != 0
        with RESULTS.open("a") as out:
            out.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
