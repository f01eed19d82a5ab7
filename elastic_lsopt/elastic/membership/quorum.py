"""Votes: ballots, what an acceptor must remember, and when a set of votes decides (Lamport 1998, "The part-time
parliament"; 2001, "Paxos made simple").

Generation g decides by one Paxos instance, number g, among its members, what generation g+1 is. Any two quorums of g
share a member, or the tie-breaker: two majorities do; half the members and a majority do; two halves with the
tie-breaker share the tie-breaker.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import inf
from typing import NamedTuple

from elastic_lsopt.elastic.membership.generation import AsJSON, Change


class Ballot(NamedTuple):
    """A term: ordered, and one proposer's own. Round 0 is the host's, prepared by the generation itself."""

    round: int
    name: str


class Accepted(NamedTuple):
    """A vote for a change, and the ballot in which it was given."""

    ballot: Ballot
    change: Change


@dataclass(frozen=True)
class Ask(AsJSON):
    """A proposer's request: promise this ballot, and where `change` is given, accept it."""

    ballot: Ballot
    change: Change | None = None


@dataclass(frozen=True)
class Vote(AsJSON):
    """An acceptor's whole memory of one instance: no ballot below `promised` gets its vote any more."""

    promised: Ballot
    accepted: Accepted | None = None

    def answer(self, ask: Ask) -> Vote:
        """The vote after `ask`: the same one where the ballot is too low."""
        if ask.ballot < self.promised:
            return self
        return Vote(ask.ballot, Accepted(ask.ballot, ask.change) if ask.change else self.accepted)


@dataclass(frozen=True)
class WitnessVote(AsJSON):
    """What the witness stores, under one key by compare-and-set: its vote in the newest instance it was asked about."""

    number: int
    vote: Vote

    @staticmethod
    def answer(stored: WitnessVote | None, number: int, ask: Ask) -> WitnessVote:
        """What to store, which is the answer also; an older instance than the stored one changes nothing."""
        if stored is None or stored.number < number:
            return WitnessVote(number, Vote(ask.ballot).answer(ask))
        return WitnessVote(number, stored.vote.answer(ask)) if stored.number == number else stored


def decides(members: int, votes: int, tie: bool) -> bool:
    """Whether this many of the members' votes are a quorum; `tie`: the tie-breaker's vote is there."""
    return 2 * votes > members or (2 * votes == members and tie)


def quorum_time(times: Iterable[float], tie_time: float) -> float:
    """The latest t such that the members with a time >= t are a quorum; -inf where there is none.

    `tie_time` is the tie-breaker's own time; a member that is the tie-breaker is among `times` also.
    """
    ordered = sorted(times, reverse=True)
    n = len(ordered)
    majority = ordered[n // 2] if n else -inf
    return max(majority, min(ordered[n // 2 - 1], tie_time)) if n and n % 2 == 0 else majority
