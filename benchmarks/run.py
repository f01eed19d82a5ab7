"""`make bench`, `python -m benchmarks.run [names]`: measure, write results/<date>-<commit>.json, refresh its README."""

from __future__ import annotations

import importlib
import json
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.chaos_table import chaos_table
from benchmarks.machine import LIBRARIES, commit, describe
from benchmarks.paired import paired_table
from benchmarks.suite import suite_table
from benchmarks.targets import TARGETS, rows

NAMES = {
    "imports": "imports", "noise": "noise", "one_process": "one_process", "steps": "step.rules",
    "memory": "step.memory", "curvature": "curvature.products",
    "curvature_spectra": "curvature.spectra", "curvature_memory": "curvature.memory",
    "elastic": "elastic.recovery", "elastic_agent": "elastic.agent",
    "elastic_layer": "elastic.layer",
    "membership_simulation": "elastic.membership_simulation", "updates": "step.updates", "adapters": "step.adapters",
    "loading": "loading", "large_model": "large_model", "trainer": "step.trainer_steps", "plan_memory": "plan_memory",
    "device": "device", "sampa_halves": "step.sampa_halves", "replica_simulation": "replicas.simulation",
    "replica_deaths": "replicas.deaths", "replica_traffic": "replicas.traffic", "replica_steps": "replicas.plain_steps",
    "replica_streaming": "replicas.streaming", "replica_slow_link": "replicas.slow_link",
    "replica_few_bits": "replicas.few_bits",
}  # fmt: skip
"""Benchmarks, as results call them, and their modules."""
RESULTS = Path(__file__).resolve().parent / "results"
HEAD = """# Results

Written by `make bench`: of each benchmark the newest run on each kind of device. Ratios are medians of pairs from one
run, in turns A B B A; the spread is their quartiles. A commit marked dirty had changes that it does not hold.
"""


def main(names: list[str]) -> int:
    """Run the named benchmarks (none: all); exit code 1 where a target is missed, 2 for a name that does not exist."""
    if unknown := [n for n in names if n not in NAMES]:
        print(f"no benchmark {', '.join(unknown)}; there are {', '.join(NAMES)}.", file=sys.stderr)
        return 2
    now = datetime.now(UTC)
    made_by = {"commit": commit(), "time": now.isoformat(timespec="seconds"), **describe()}
    kind = "-cuda" if made_by["kind"] == "cuda" else ""
    path = RESULTS / f"{now:%Y-%m-%d}-{made_by['commit']}{kind}.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    missed = 0
    for name in names or NAMES:
        begin = time.perf_counter()
        figures = importlib.import_module(f"benchmarks.{NAMES[name]}").run()
        results[name] = {
            "made_by": made_by,
            "seconds": round(time.perf_counter() - begin, 1),
            "figures": figures,
        }
        path.write_text(json.dumps(results, indent=2) + "\n")
        for figure, value, spread, target, reached in rows(name, figures):
            print(f"{name:12} {figure:52} {value:>12}  {spread:22} {target:>12}  {reached}", flush=True)
            missed += reached == "no"
    (RESULTS / "README.md").write_text(page(RESULTS))
    return int(missed > 0)


def page(folder: Path) -> str:
    """The README of a folder of results."""
    runs = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    sections = (section(name, kind, runs) for name in NAMES for kind in ("cpu", "cuda"))
    more = (
        paired_table(folder / "paired.jsonl"),
        chaos_table(folder / "chaos.jsonl"),
        suite_table(folder / "suite.jsonl"),
    )
    return "\n".join([HEAD, *sections, *more])


def section(name: str, kind: str, runs: list[dict[str, Any]]) -> str:
    """A table of the newest run of a benchmark on a CPU or a GPU."""
    made = [run[name] for run in runs if name in run and run[name]["made_by"]["kind"] == kind]
    if not made:
        if kind == "cuda" and name == "imports":
            return ""
        return f"## {name} on {'a GPU' if kind == 'cuda' else 'a CPU'}\n\nUnproved: no run has been committed.\n"
    newest = max(made, key=lambda run: run["made_by"]["time"])
    by, figures = newest["made_by"], newest["figures"]
    versions = ", ".join(f"{k} {by[k]}" for k in ("python", *LIBRARIES) if k in by)
    lines = [
        f"## {name} on {by['device']}",
        "",
        f"Commit {by['commit']}, {by['time']}, {by['cores']} cores (load {by['load_before']} before), {versions}; "
        f"{newest['seconds']:.0f} s.",
        "",
        "| figure | value | spread | target | reached |",
        "| --- | ---: | --- | --- | --- |",
        *(f"| {' | '.join(row)} |" for row in rows(name, figures)),
        *(
            f"| {t.figure} | - | - | {t} | unproved |"
            for t in TARGETS
            if t.benchmark == name and t.figure not in figures and not (t.figure.startswith("gpu") and kind == "cpu")
        ),
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
