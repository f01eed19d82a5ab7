"""Who trains together: a pure state machine that each node agent runs.

    state, effects = advance(state, event, now)      # no socket, no clock, no chance

Generation g decides by one vote of its members what g+1 is (quorum.py). The leader of instance g proposes: first the
host of g in round 0, which needs no prepare phase, so a planned change is one round trip (ask, votes, news). Members
report to the leader alone; nobody else reads more than a few records. An agent without a grant for lease_s / 2
reports to the next three members in order also, and stands for leader itself, earlier ones first; another agent
promises its vote only if it too has no grant.

[Note: leases]
An agent's lease runs lease_s from when it *sent* the newest heartbeat that its leader has echoed, by its own clock;
without a lease it kills its workers. A leader grants while less than lease_s / 2 has passed since it sent a heartbeat
that a quorum of g has echoed, each under its ballot; it grants nothing to those whom its own proposal evicts. It may
propose to evict X evict_s = 2 lease_s after it heard X last, or after it began to lead, whichever is later.
No worker of X is alive when g+1 commits:
  - granted by this leader: X's lease ends at most lease_s after a heartbeat that was heard evict_s ago;
  - granted by an older leader: its quorum and the promises that made this leader share an agent p. What p sent
    to the older leader under the older ballot, it sent before it promised, so before this leader began. So the older
    leader's last grant came at most lease_s / 2 after this leader began, and ended lease_s later: 1.5 < 2.
This holds while no clock runs more than 4/3 as fast as another, less the time from a lease's end to the kill
(the agent's tick); with clocks within 10 % of true time (11/9 of each other) 0.15 lease_s are left for the kill.
The deposed leader and those who stayed with it are cases of X. A promise to leave a leader is for good within g,
so a leader that was left by its quorum cannot grant again before g+1.

[Note: votes]
What an agent promises or accepts is on disk before it is sent (`Persist` comes first), so a crash forgets no vote.
A new leader proposes the change that was accepted in the highest ballot that its quorum of promises reports, if any.
An agent that lost its disk comes as a newcomer and has no vote before the generation that admits its new workers.

[Note: a disk that cannot be written]
The event is taken again, with `may_vote` False: no promise, no acceptance, no candidacy and no proposal comes of it,
and nothing to persist; reports, grants and leases go on. Such an agent still enters a generation that the others
decide. Its first vote there, that for the host in round 0, is what the generation itself implies, so a crash forgets
nothing: whoever knows the generation again has it again.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from elastic_lsopt.elastic.membership.generation import Generation, Member
from elastic_lsopt.elastic.membership.placement import vacant
from elastic_lsopt.elastic.membership.quorum import Ballot, Vote
from elastic_lsopt.elastic.membership.record import Effect, Event, Remembered, Rules
from elastic_lsopt.elastic.membership.state import Campaign, State
from elastic_lsopt.elastic.membership.turn import Turn


@dataclass(frozen=True)
class View:
    """What `status` shows."""

    number: int
    host: str
    members: tuple[Member, ...]
    running: bool
    leads: bool
    lease_left_s: float
    waiting: tuple[str, ...]
    """Newcomers that the leader knows and has not admitted."""
    dissolving: bool
    """Every member is leaving: there is nobody to hand the state over to. In a job of one replica only the leader says
    so, whose workers stop all others in their next step."""


def found(name: str, address: str, rules: Rules) -> State:
    """The first agent of a job: generation 0, alone and not running, until enough others are ready."""
    first = Generation(
        0, 0, name, (Member(name, address, ()),), "founded", (), running=False, replicas=vacant(rules.replicas)
    )  # fmt: skip
    vote = Vote(Ballot(0, name))
    return State(
        rules, name, address, generation=first, vote=vote, campaign=Campaign(vote.promised, leader_since_s=-inf)
    )


def newcomer(name: str, address: str, rules: Rules, host_address: str, incarnation: int = 0) -> State:
    """An agent that wants to join the job whose host, or any member, has its store at `host_address`.

    A name belongs to one agent: two at a time must not share it. One after another may; `incarnation` grows from each
    to the next, so that nobody takes the old one's letters for the new one's, and a refusal ends whom it was for.
    """
    return State(rules, name, address, join_address=host_address, incarnation=incarnation)


def restarted(remembered: Remembered, address: str, rules: Rules, now: float) -> State:
    """An agent after a crash: it votes as the member that it was, and has no workers; `address` is the old one."""
    mine = remembered.vote.promised == (0, remembered.name)
    accepted = remembered.vote.accepted
    resumed = accepted.change if accepted and mine else None
    return State(
        rules,
        remembered.name,
        address,
        incarnation=remembered.incarnation + 1,
        generation=remembered.generation,
        vote=remembered.vote,
        promised_at_s=now,
        lease_until_s=now + rules.lease_s,
        suspect_from_s=now + rules.suspect_s,
        campaign=Campaign(remembered.vote.promised, leader_since_s=now, adopted=resumed) if mine else None,
    )


def view(state: State, now: float) -> View:
    """Members, generation, host and lease as this agent knows them."""
    generation = state.generation
    known = generation.member if generation else {}
    return View(
        number=state.number,
        host=generation.host if generation else "",
        members=generation.members if generation else (),
        running=bool(generation and generation.running),
        leads=state.leads,
        lease_left_s=max(0.0, state.lease_until_s - now),
        waiting=tuple(name for name, _ in state.peers if name not in known),
        dissolving=state.dissolves if state.leads else _is_told_to_dissolve(state),
    )


def _is_told_to_dissolve(state: State) -> bool:
    host = state.peers.get(state.generation.host) if state.generation else None
    return host is not None and host.record.dissolving


def advance(state: State, event: Event, now: float, *, may_vote: bool = True) -> tuple[State, tuple[Effect, ...]]:
    """The state after `event` at the agent's own time `now` (seconds, never backwards), and what to do, in order.

    Where its Persist fails, carry out none of what follows it: take the same event again with `may_vote` False.
    O(1) for a record, apart from the change that it completes; O(members) for a leader's Tick and for a change.
    """
    return Turn(state, now, may_vote=may_vote).take(event)
