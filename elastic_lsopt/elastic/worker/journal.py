"""The journal: one JSON object per change of members or rewind, in the run folder's journal.jsonl, by rank 0."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

JOURNAL = "journal.jsonl"
SAME_S = 600.0
"""Within which several replicas tell of one exchange."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """What became of the job when its members changed."""

    generation: int
    why: str
    workers: tuple[str, ...]
    nodes: tuple[str, ...]
    gone: tuple[str, ...]
    """Workers that died; the rest of those that are no longer here left as planned."""
    samples: int
    """Committed samples when the new generation began: what the clock says."""
    step: int
    source: str
    """memory, checkpoint or start: where the state came from; newcomer: it has none, and other replicas train."""
    redone_steps: int
    """Steps that survivors had finished beyond the state that went on, done again on the same samples."""
    bytes_moved: int
    """State that went from memory to memory, over all ranks."""
    seconds: Mapping[str, float]
    """By phase, of the slowest rank."""
    before: Mapping[str, Any] | None
    """Batch, rate, betas, epsilon, rho …, and each rank's micro-batches, under the plan before; None where there was
    none."""
    after: Mapping[str, Any]
    survives_node_loss: bool
    """Whether each shard has a mirror on another node."""
    replica: int | None = None
    """Which one of several; None, and not written, in a job of one."""
    time: float = field(default_factory=time.time)

    def of_all(
        self, everyones: Sequence[tuple[Mapping[str, float], int, int]], told: Sequence[tuple[str, tuple[str, ...]]]
    ) -> Change:
        """With the slowest rank's seconds and all ranks' bytes; each rank gives (seconds, bytes moved, redone steps).

        `told` is (why, gone) of this generation and of those before it that ended without a step.
        """
        phases = dict.fromkeys(name for seconds, _, _ in everyones for name in seconds)
        return replace(
            self,
            why="; then ".join(dict.fromkeys(why for why, _ in told)) or self.why,
            gone=tuple(dict.fromkeys(worker for _, gone in told for worker in gone)),
            seconds={name: max(seconds.get(name, 0.0) for seconds, _, _ in everyones) for name in phases},
            bytes_moved=sum(moved for _, moved, _ in everyones),
            redone_steps=max(redone for _, _, redone in everyones),
        )

    def line(self) -> str:
        """What a person is told of it."""
        workers = "1 worker goes on" if len(self.workers) == 1 else f"{len(self.workers)} workers go on"
        source = {"checkpoint": " from its checkpoint", "newcomer": " as a newcomer"}.get(self.source, "")
        whose = "" if self.replica is None else f"replica {self.replica} of "
        redone = f"; steps done again: {self.redone_steps}" if self.redone_steps else ""
        return (
            f"{whose}generation {self.generation}: {self.why}; {workers} at step {self.step + 1}{source} after "
            f"{sum(self.seconds.values()):.1f} s{redone}; batch {self.after['global_batch_size']}, "
            f"rate {self.after['learning_rate']:.1e}"
        )


@dataclass(frozen=True, kw_only=True)
class Rewind:
    """A job that had diverged went back to its last good state, at a lower rate and with other samples."""

    generation: int
    why: str
    from_step: int
    """The last step of the trajectory that was left."""
    to_step: int
    """The step of the checkpoint from which the job goes on."""
    samples: int
    lr_factor: float
    """On the learning rate of the job's settings, from here on."""
    event: str = "rewind"
    time: float = field(default_factory=time.time)

    def line(self) -> str:
        """What a person is told of it."""
        return (
            f"rewound from step {self.from_step} to step {self.to_step}: {self.why}; the rate is {self.lr_factor:g} of "
            "the job's from here on, and the samples come in another order"
        )


@dataclass(frozen=True, kw_only=True)
class Meeting:
    """An exchange of replicas at which somebody was missing, left out or let in, or which failed."""

    generation: int
    number: int
    members: tuple[int, ...]
    fit: tuple[int, ...]
    """The members that exchanged; the others were given the model."""
    missing: tuple[int, ...]
    well: bool
    why: str
    """What failed on this rank."""
    seconds: float
    samples: int
    sent_bytes: int
    consensus_distance: float | None
    """Root mean square distance of the fit members from their mean, before it; None where it is not known."""
    event: str = "exchange"
    time: float = field(default_factory=time.time)

    def line(self) -> str:
        """What a person is told of it."""
        new = [m for m in self.members if m not in self.fit]
        told = [
            f"{verb} replica{'s' if len(who) > 1 else ''} {', '.join(map(str, who))}"
            for verb, who in (("without", self.missing), ("the model is given to", new if self.well else ()))
            if who
        ]
        failed = [] if self.well else [f"{self.why or 'a member failed'}; all go on as they were"]
        return f"exchange {self.number} of {len(self.members)} replicas: {'; '.join([*told, *failed])}"


@dataclass
class Phases:
    """Seconds by phase of one change, in order."""

    seconds: dict[str, float] = field(default_factory=dict)
    _since: float = field(default_factory=time.monotonic)

    def end(self, phase: str) -> None:
        now = time.monotonic()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._since
        self._since = now


class Journal:
    """Appends changes, and `say`s a line of each. A full disk costs the journal's line, never the training."""

    def __init__(self, run_folder: Path, say: Callable[[str], None] = lambda line: None) -> None:
        self.path, self.say = run_folder / JOURNAL, say

    def write(self, change: Change | Rewind | Meeting) -> None:
        self.say(change.line())
        with suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as out:
                told = asdict(change)
                if told.get("replica", 0) is None:
                    del told["replica"]
                out.write(json.dumps(told) + "\n")


def read_journal(run_folder: Path) -> list[dict[str, Any]]:
    """The changes of members of a run, in order; a line that a crash cut short is passed over."""
    return [row for row in _rows(run_folder) if _event(row) is None]


def read_rewinds(run_folder: Path) -> list[dict[str, Any]]:
    """The rewinds of a run, in order."""
    return [row for row in _rows(run_folder) if _event(row) == "rewind"]


def read_meetings(*run_folders: Path) -> list[dict[str, Any]]:
    """The exchanges of replicas that were out of the ordinary, in order, each once, whichever of them tell of it."""
    rows = [row for folder in run_folders for row in _rows(folder) if _event(row) == "exchange" and "number" in row]
    out: list[dict[str, Any]] = []
    for row in sorted(rows, key=_time):
        told = [o for o in out if _time(row) - _time(o) < SAME_S]  # the number comes again in a later life of the job
        if not any(all(row.get(key) == o.get(key) for key in ("number", "members", "fit", "well")) for o in told):
            out.append(row)
    return out


def _time(row: Mapping[str, Any]) -> float:
    at = row.get("time")
    return float(at) if isinstance(at, int | float) else 0.0


def line_of(meeting: Mapping[str, Any]) -> str:
    """What a person is told of such an exchange, as the journal has it."""
    blank = {"generation": 0, "members": (), "fit": (), "missing": (), "well": True, "why": "", "seconds": 0.0}
    blank |= {"samples": 0, "sent_bytes": 0, "consensus_distance": None}
    return Meeting(**{**blank, **{f.name: meeting[f.name] for f in fields(Meeting) if f.name in meeting}}).line()


def _event(row: Any) -> Any:
    return row.get("event") if isinstance(row, dict) else None


def _rows(run_folder: Path) -> list[Any]:
    rows = []
    with suppress(FileNotFoundError):
        for line in (run_folder / JOURNAL).read_text(encoding="utf-8").splitlines():
            with suppress(json.JSONDecodeError):
                rows.append(json.loads(line))
    return rows
