"""What agents tell each other, what the membership machine is told, and what it asks its agent to do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from elastic_lsopt.elastic.membership.generation import AsJSON, Change, Generation
from elastic_lsopt.elastic.membership.quorum import Ask, Ballot, Vote
from elastic_lsopt.errors import UserError


@dataclass(frozen=True)
class Rules:
    """The job's settings, equal on all agents; times in seconds. Raises UserError where they contradict each other."""

    min_nodes: int
    max_nodes: int
    job: str
    fingerprint: Mapping[str, str] = field(hash=False)
    """Digests of code and config by name: a newcomer with another one is refused."""
    lease_s: float = 2.0
    join_debounce_s: float = 0.3
    witness: str | None = None
    replicas: int = 1
    """Into how many the workers are dealt."""
    even_out_s: float = 60.0
    """How long replicas stay of uneven size after a death, before workers are moved: others may come until then."""

    def __post_init__(self) -> None:
        if not 1 <= self.min_nodes <= self.max_nodes:
            raise UserError(f"min_nodes={self.min_nodes} must be between 1 and max_nodes={self.max_nodes}.")
        if self.lease_s <= 0 or self.join_debounce_s < 0:
            raise UserError(f"lease_s={self.lease_s} must be > 0 and join_debounce_s={self.join_debounce_s} >= 0.")
        if self.replicas < 1:
            raise UserError(f"replicas={self.replicas} must be >= 1.")

    @property
    def heartbeat_s(self) -> float:
        """Between two reports of an agent; the agent must tick at least as often."""
        return self.lease_s / 8

    @property
    def suspect_s(self) -> float:
        """Without a grant for so long an agent suspects its leader, and a leader that it has lost its quorum."""
        return self.lease_s / 2

    @property
    def evict_s(self) -> float:
        """Silence after which a member may be evicted. [Note: leases] in membership.py."""
        return 2 * self.lease_s


class Heartbeat(NamedTuple):
    """A record's place in its writer's history, over crashes too, and when it was sent by the writer's own clock."""

    incarnation: int
    counter: int
    sent_s: float


@dataclass(frozen=True)
class Record(AsJSON):
    """All that one agent tells one reader: a register with one writer, where a newer heartbeat replaces an older
    one."""

    name: str
    address: str
    job: str
    heartbeat: Heartbeat
    answer: bool
    """Whether it answers a report, and so needs no answer."""
    number: int
    """The newest generation that the writer knows; -1 for none."""
    vote: Vote | None
    """The writer's vote in instance `number`; None where it is no member."""
    workers: tuple[str, ...] = ()
    """The living, ready workers on the writer's node."""
    leaving: tuple[str, ...] = ()
    """Those of them that are being drained."""
    departing: bool = False
    broken: int = -1
    """The generation in which a collective broke on the writer's node; -1 for none."""
    broken_in: tuple[int, ...] = ()
    """The replicas in which it broke, in a job of several."""
    dissolving: bool = False
    """In a job of several replicas, a leader's word: every member is leaving, so each replica must stop."""
    finished: bool = False
    lost: bool = False
    """Whether the writer suspects its leader."""
    echo: Heartbeat | None = None
    """The reader's newest heartbeat that the writer has heard."""
    grants: bool = False
    """Whether the echo is a lease."""
    ask: Ask | None = None
    change: Change | None = None
    """What made generation `number` of the one before: for a reader that is one behind."""
    generation: Generation | None = None
    """Generation `number` in full: for a reader that is further behind."""
    fingerprint: tuple[tuple[str, str], ...] = ()
    """A newcomer's digests; a member sends none."""
    refusal: str = ""


@dataclass(frozen=True)
class Remembered(AsJSON):
    """What an agent must find again after a crash: it is on disk before anything that follows from it is sent."""

    name: str
    incarnation: int
    generation: Generation
    vote: Vote


# Events. -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tick:
    """Time has passed; comes at least every `rules.beat_s`."""


@dataclass(frozen=True)
class Heard:
    """Records for this agent were read, in this order; lost, late, doubled and reordered ones do no harm."""

    records: tuple[Record, ...]


@dataclass(frozen=True)
class Unreachable:
    """The store of this agent refused a connection: its process is gone, or a network is."""

    name: str


@dataclass(frozen=True)
class WorkerReady:
    """A worker was spawned on this node and has warmed up; its name is new in the job."""

    worker: str


@dataclass(frozen=True)
class WorkerExited:
    """A worker died, or a drained one ended; it has been reaped. (One that ends well at the job's end: Finished.)"""

    worker: str


@dataclass(frozen=True)
class DrainWorker:
    """This worker shall hand its state over and leave."""

    worker: str


@dataclass(frozen=True)
class Broken:
    """A collective of generation `number` broke on this node, and nobody has died: its workers must form anew.

    In a job of several replicas it was one of `replica`, which generation `number` formed.
    """

    number: int
    replica: int = 0


@dataclass(frozen=True)
class Drain:
    """This whole node shall hand its state over and leave."""


@dataclass(frozen=True)
class Finished:
    """All workers of this node ended well, at the end of the job."""


@dataclass(frozen=True)
class WitnessSaid:
    """What the witness stores after an AskWitness, whose `sent_s` it repeats."""

    number: int
    vote: Vote
    sent_s: float


Event = Tick | Heard | Unreachable | WorkerReady | WorkerExited | DrainWorker | Broken | Drain | Finished | WitnessSaid


# Effects, to be carried out in order. --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Persist:
    """Write to disk, durably, before any later effect."""

    remembered: Remembered


@dataclass(frozen=True)
class Publish:
    """Put the record where each (reader, address) reads it: into the store at `address`, under (writer, reader).

    An agent writes into the stores of those it reports to, and reads there what they have for it; a leader writes
    into its own. The reader's name is "" where a newcomer knows an address only.
    """

    to: tuple[tuple[str, str], ...]
    record: Record


@dataclass(frozen=True)
class Enter:
    """This generation is agreed: tell the workers. Own workers that are not in it must end."""

    generation: Generation


@dataclass(frozen=True)
class KillWorkers:
    """Kill all workers of this node and reap them before any later effect."""

    why: str


@dataclass(frozen=True)
class Leave:
    """This agent has no further part in the job: end it."""

    why: str


@dataclass(frozen=True)
class AskWitness:
    """Replace what the witness stores by `WitnessVote.answer(stored, number, ask)`, and tell the result."""

    number: int
    ask: Ask
    sent_s: float

    @property
    def term(self) -> Ballot:
        """The ballot that asks."""
        return self.ask.ballot


@dataclass(frozen=True)
class Note:
    """One line for the log."""

    text: str


Effect = Persist | Publish | Enter | KillWorkers | Leave | AskWitness | Note
