"""What an agent is in the present instance, as a value that has all that goes with it, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass

from elastic_lsopt.elastic.membership.quorum import Vote
from elastic_lsopt.elastic.membership.state import Campaign, State


@dataclass(frozen=True)
class Newcomer:
    """No member: it has no vote, and reports to the agent at `joins` until a generation lets it in."""

    joins: str


@dataclass(frozen=True)
class Member:
    """It follows the leader that it has promised itself to."""

    vote: Vote


@dataclass(frozen=True)
class Candidate:
    """It stands for leader, and counts promises."""

    vote: Vote
    campaign: Campaign


@dataclass(frozen=True)
class Leader:
    """A quorum has promised itself to it: it grants leases and proposes the next generation."""

    vote: Vote
    campaign: Campaign
    since_s: float


Role = Newcomer | Member | Candidate | Leader


def role_of(state: State) -> Role:
    """The role of an agent in this state."""
    vote, campaign = state.vote, state.campaign
    if vote is None:
        return Newcomer(state.join_address)
    if campaign is None:
        return Member(vote)
    if campaign.leader_since_s is None:
        return Candidate(vote, campaign)
    return Leader(vote, campaign, campaign.leader_since_s)
