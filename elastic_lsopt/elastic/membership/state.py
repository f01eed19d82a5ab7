"""What one agent knows: the state of the membership machine."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from elastic_lsopt.elastic.membership.generation import Change, Generation
from elastic_lsopt.elastic.membership.quorum import Accepted, Ballot, Vote
from elastic_lsopt.elastic.membership.record import Record, Remembered, Rules
from elastic_lsopt.elastic.membership.shared_map import Table

EMPTY: Table = Table()


@dataclass(frozen=True)
class Peer:
    """What is known of another agent."""

    record: Record
    heard_s: float
    fresh_s: float = -inf
    """When I sent the newest heartbeat that it echoed under my ballot."""


@dataclass(frozen=True)
class Campaign:
    """A leader's work in the present instance, or a candidate's."""

    ballot: Ballot
    leader_since_s: float | None
    """Since when a quorum has promised; None for a candidate."""
    promises: Table[None] = EMPTY
    accepts: Table[None] = EMPTY
    adopted: Change | None = None
    """What the promises oblige this leader to propose."""
    value: Change | None = None
    """What it has proposed."""
    best: Accepted | None = None
    """The vote in the highest ballot that the promises reported."""
    witness: Vote | None = None
    witness_s: float = -inf
    """When I sent the newest question that the witness answered under my ballot."""
    quorum_s: float = -inf
    """When I sent the newest heartbeat that a quorum has echoed under my ballot."""


@dataclass(frozen=True)
class State:
    """An agent's whole state, hashable; each time is by its own clock."""

    rules: Rules
    name: str
    address: str
    join_address: str = ""
    incarnation: int = 0
    heartbeats: int = 0
    reported_s: float = -inf
    generation: Generation | None = None
    last: Change | None = None
    vote: Vote | None = None
    """My vote in instance `generation.number`; None where I am no member."""
    promised_at_s: float = -inf
    """When I last promised a new ballot."""
    lease_until_s: float = -inf
    suspect_from_s: float = -inf
    workers: tuple[str, ...] = ()
    waiting: tuple[str, ...] = ()
    """Workers that are ready and not offered yet, since I have no lease."""
    offered: tuple[str, ...] = ()
    """Every worker that was ready since I am a newcomer: a member with others of them is an earlier life of mine."""
    draining: tuple[str, ...] = ()
    departing: bool = False
    broken: int = -1
    """The generation in which a collective broke on my node; -1 for none."""
    broken_in: tuple[int, ...] = ()
    """The replicas in which it broke, in a job of several."""
    finished: bool = False
    unreachable: frozenset[str] = frozenset()
    peers: Table[Peer] = EMPTY
    restless: Table[None] = EMPTY
    """Peers whose records differ from the generation."""
    joins_s: tuple[float, float] | None = None
    """When the first and the newest of the waiting joins came."""
    campaign: Campaign | None = None
    even_out_at_s: float = inf
    """When a leader of uneven replicas may move workers."""
    let_go_at_s: float = inf
    """When a leader of several replicas lets those go who are leaving: all may be, and then each replica must stop."""
    leave_at_s: float = inf
    leave_why: str = ""
    ended: bool = False
    saved: Remembered | None = None

    @property
    def number(self) -> int:
        """The newest generation that I know; -1 for none."""
        return self.generation.number if self.generation else -1

    @property
    def leads(self) -> bool:
        """Whether I am the leader of the present instance."""
        return self.campaign is not None and self.campaign.leader_since_s is not None

    @property
    def dissolves(self) -> bool:
        """Whether I am leaving, and every other member too."""
        return self.departing and all(
            m.name == self.name or ((peer := self.peers.get(m.name)) is not None and peer.record.departing)
            for m in (self.generation.members if self.generation else ())
        )
