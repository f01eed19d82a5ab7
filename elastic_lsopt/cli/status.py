"""`elastic-lsopt status RUN_FOLDER`: members, generation, throughput and last changes of an elastic job, live.

Asks any agent that answers; one that is not the host says who is. Reads the journal for the changes.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from elastic_lsopt.checkpoint.ownership import owner_of
from elastic_lsopt.elastic.agent.node_folder import addresses
from elastic_lsopt.elastic.agent.status import status_at
from elastic_lsopt.elastic.mail.signing import Refused, job_secret
from elastic_lsopt.elastic.worker.journal import line_of, read_journal, read_meetings, read_rewinds
from elastic_lsopt.errors import UserError
from elastic_lsopt.training.reporting.run_folder import replica_folders
from elastic_lsopt.training.reporting.run_state import read_state

CHANGES = 5
EVERY_S = 0.5
Status = dict[str, Any]


def status(run_folder: str | Path, *, endpoint: str | None, secret_file: str | None, once: bool) -> int:
    """Print the status; on a terminal until Ctrl-C. Where nobody answers, what state.json and the journal tell.

    Returns the exit code; raises UserError where there is neither an agent nor one of these.
    """
    from rich.console import Console
    from rich.live import Live

    folder = Path(run_folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is no run folder; give the output_dir of the job.")
    console = Console()
    changes, state = read_journal(folder), state_line(folder)
    if state is not None and not (folder / "elastic").is_dir():  # a job of fixed size has no agent
        console.print(state, *replica_lines(folder), *last_meetings(folder), sep="\n")
        return 0
    secret = job_secret(secret_file, folder)
    try:
        found = ask(folder, endpoint, secret)
    except UserError as error:
        if not changes and state is None:
            raise
        parts = [*([last_changes(changes)] if changes else []), state or str(error), *last_meetings(folder)]
        console.print(*parts, sep="\n")
        return 0
    if once or not console.is_terminal:
        console.print(table(found, changes, last_meetings(folder)))
        return 0
    with Live(table(found, changes, last_meetings(folder)), console=console) as live, suppress(KeyboardInterrupt):
        while True:
            time.sleep(EVERY_S)
            try:
                live.update(table(ask(folder, endpoint, secret), read_journal(folder), last_meetings(folder)))
            except UserError:
                print("the job has ended.", file=sys.stderr)
                return 0
    return 0


def state_line(folder: Path) -> str | None:
    """What the job said last of itself, and whether it may still be running; None where it has said nothing."""
    told = read_state(folder)
    if told is None:
        return None
    line = f"{told['state']} after step {told['step']} of {told['steps']}"
    if told["state"] == "running":
        owner = owner_of(folder)
        if owner is None or owner[1] is False:
            line += ", but its process has gone (killed, or its node was lost); the same command goes on"
        elif owner[1] is None:
            line += f", as process {owner[0]['process']} on {owner[0]['host']} said at {_clock(told['time'])}"
        else:
            line += f", said at {_clock(told['time'])} by process {owner[0]['process']}"
    rewinds = len(read_rewinds(folder))
    return line + (f"; rewound {rewinds} times" if rewinds else "") + (f": {told['why']}" if told["why"] else "")


def replica_lines(folder: Path) -> list[str]:
    """A line for each other replica of the job."""
    others = replica_folders(folder)
    return [f"replica {number}: {line}" for number, other in others.items() if (line := state_line(other))]


def last_meetings(folder: Path) -> list[Any]:
    """The last exchanges of replicas that were out of the ordinary, a line each, as something that rich can print."""
    from rich.text import Text

    meetings = read_meetings(folder, *replica_folders(folder).values())[-CHANGES:]
    return [Text(f"{_clock(meeting.get('time', 0.0))} {line_of(meeting)}") for meeting in meetings]


def _clock(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def ask(folder: Path, endpoint: str | None, secret: bytes) -> Status:
    """What the host of the job says, found through any agent. Raises UserError where none answers."""
    tried = [endpoint] if endpoint else addresses(folder)
    best: Status | None = None
    for address in tried:
        with suppress(RuntimeError, OSError, Refused):
            told = status_at(address, secret)
            host = told["host_address"]
            if host and host != address:
                with suppress(RuntimeError, OSError, Refused):
                    told = status_at(host, secret)
            if best is None or _number(told) > _number(best):
                best = told
    if best is None:
        raise UserError(
            f"no agent of this job answers (tried {', '.join(tried) or 'none: no agent has written its address'}); "
            "the job may have ended, or give --endpoint host:port of a living node."
        )
    return best


def _number(told: Status) -> int:
    return told["generation"]["number"] if told["generation"] else -1


def table(told: Status, changes: list[dict[str, Any]], meetings: Sequence[Any] = ()) -> Any:
    """The status as something that rich can print; `meetings` are lines below it."""
    from rich.console import Group
    from rich.table import Table

    generation = told["generation"]
    if generation is None:
        return f"no generation yet; waiting for nodes at {told['host_address']}"
    members = Table(title=f"generation {generation['number']} · host {generation['host']} · {_speed(told)}")
    places, place_of = _places(generation)
    for column in ("node", "host", "pid", "state", *places, "step", "samples", "loss", "s per step"):
        members.add_column(column, justify="left" if column in ("node", "host", "state") else "right", overflow="fold")
    ranks = [(member["name"], worker) for member in generation["members"] for worker in member["workers"]]
    spares = [
        (node, worker) for node, report in sorted(told["reports"].items()) for worker in report["workers"]
        if (node, worker) not in ranks
    ]  # fmt: skip
    for node, worker in [*ranks, *spares]:
        report = told["reports"].get(node, {"workers": {}, "draining": False, "host": ""})
        said = report["workers"].get(worker, {})
        members.add_row(
            node, report["host"], str(said.get("pid", "")), "leaving" if report["draining"] else said.get("state", ""),
            *place_of.get(worker, [""] * len(places)), str(said.get("step", "")), str(said.get("samples", "")),
            _short(said.get("loss")), _short(said.get("seconds")),
        )  # fmt: skip
    return Group(members, last_changes(changes), *meetings)


def _places(generation: dict[str, Any]) -> tuple[list[str], dict[str, list[str]]]:
    """The columns that say where a worker is, and what stands there by worker: its rank, in its replica where a job has
    several."""
    if replicas := generation.get("replicas"):
        seats = {w: [str(k), str(rank)] for k, r in enumerate(replicas) for rank, w in enumerate(r["workers"])}
        return ["replica", "rank"], seats
    workers = [worker for member in generation["members"] for worker in member["workers"]]
    return ["rank"], {worker: [str(rank)] for rank, worker in enumerate(workers)}


def last_changes(changes: list[dict[str, Any]]) -> Any:
    """The end of the journal as something that rich can print."""
    from rich.table import Table

    recent = Table(title="last changes")
    for column in ("generation", "why", "world", "samples", "batch", "rate", "seconds", "from"):
        recent.add_column(column)
    for change in changes[-CHANGES:]:
        after = change["after"]
        recent.add_row(
            str(change["generation"]), change["why"], str(len(change["workers"])), str(change["samples"]),
            str(after.get("global_batch_size", "")), _short(after.get("learning_rate")),
            f"{sum(change['seconds'].values()):.2f}", change["source"],
        )  # fmt: skip
    return recent


def _speed(told: Status) -> str:
    """Samples a second, from what the ranks say of their last step."""
    said = [w for report in told["reports"].values() for w in report["workers"].values() if w.get("seconds")]
    if not said:
        return "no step yet"
    newest = max(said, key=lambda w: w["step"])
    return f"{newest['batch'] / newest['seconds']:.1f} samples a second" if newest.get("batch") else "running"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else ""
