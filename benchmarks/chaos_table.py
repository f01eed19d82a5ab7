"""The results of `make chaos` as a table: events that a living job went through, and what was checked of them."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any

TARGET_EVENTS = 200


def chaos_table(results: Path) -> str:
    """A row a backend, from the lines that tests/chaos/driver.py writes; only rounds that have ended count."""
    if not results.exists():
        return "## chaos\n\nUnproved: no run has been committed.\n"
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    table = [
        "## chaos",
        "",
        "Kill -9, SIGTERM, SIGSTOP, joins, agents' and hosts' deaths at living jobs of 3 to 5 nodes "
        "(`tests/chaos/driver.py`). After each round: every loss is the undisturbed run's to 1e-5, every sample is "
        "used once, replicas are equal to the bit, no process is left. Seconds: from the event until two further steps "
        "are done, a hang's own time limit of 4 s included.",
        "",
        "| backend | events | target | rounds passed | failures (seed) | seconds: median, largest | commits |",
        "| --- | ---: | ---: | ---: | --- | --- | --- |",
    ]
    for backend in dict.fromkeys(line["backend"] for line in lines):
        table.append(_row(backend, [line for line in lines if line["backend"] == backend]))
    return "\n".join([*table, ""])


def _row(backend: str, lines: list[dict[str, Any]]) -> str:
    ends = {line["seed"]: line for line in lines if "event" not in line}
    events = [line["seconds"] for line in lines if "event" in line and line["seed"] in ends]
    failed = [f"{end['failure']} ({seed})" for seed, end in ends.items() if "failure" in end]
    commits = ", ".join(dict.fromkeys(end["commit"] for end in ends.values()))
    return (
        f"| {backend} | {len(events)} | {TARGET_EVENTS} | {len(ends) - len(failed)} | {', '.join(failed) or 'none'} | "
        f"{median(events):.1f}, {max(events):.1f} | {commits} |"
    )
