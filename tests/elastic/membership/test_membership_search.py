"""The searches of small worlds (search.py): a formed generation, then every order of what can happen, up to a depth.

`each_read` is fine: single reads, also of older records (delay) or never (loss), every record twice (World.deliver),
half a lease at a time. It starts at the moments that matter: nothing under way; all suspect a dead host; a proposal is
out. `each_round` is long: half a lease, and all records but those of an agent or of one direction of a link; so
elections and evictions (six rounds and more) are in it. Failures come at any point in both. All clocks run alike here
(skew is in test_membership_random.py), and time moves for all at once. No symmetry is used: candidates have an order.
Each test prints the states that it visited. In `make test`, fine: 2 agents with 2 failures 3,349; 3 with 2 failures
2,120, from a lost host 3,553, from a proposal 7,083; 4 from a proposal 491. Long: 2 agents with 2 failures 1,231; 3
with 1 failure, decided at one agent 406. So two failures of 4 agents are left to the deeper tests, marked full.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from elastic_lsopt.elastic.membership import leader, placement
from elastic_lsopt.elastic.membership import machine as membership
from elastic_lsopt.elastic.membership.record import Effect, Event, Persist, Rules, WorkerExited
from elastic_lsopt.elastic.membership.state import State
from tests.elastic.membership.model import Advance, Violation, World, begin
from tests.elastic.membership.search import Left, Steps, each_read, each_round, search

RULES = Rules(min_nodes=1, max_nodes=4, job="j", fingerprint={}, lease_s=2.0, join_debounce_s=0.0)
OF_TWO = replace(RULES, replicas=2, even_out_s=3.0)


def formed(agents: int, rules: Rules = RULES) -> World:
    """A generation that runs, with nothing under way."""
    world = begin(agents, rules)
    return replace(world, mail=(), decided=world.decided[-1:])


def host_lost(agents: int) -> World:
    """The host is dead, and all others suspect it: their records are under way."""
    world = formed(agents).crash("a")
    return world.tick(RULES.suspect_s).tick(RULES.suspect_s / 2)


def proposed(agents: int, rules: Rules = RULES) -> World:
    """A worker died, and the host's proposal is under way."""
    world = formed(agents, rules)
    place = world.place("a")
    world = replace(world, places=(replace(place, alive=frozenset()), *world.places[1:]))
    return world.give("a", WorkerExited("a0"))


def committed_alone(agents: int, advance: Advance = membership.advance) -> World:
    """b has accepted the host's proposal, so it is decided; the host knows that, and nobody else."""
    return proposed(agents).deliver("a", "b", 0, advance).deliver("b", "a", 0, advance)


full = pytest.mark.full


@pytest.mark.parametrize(
    ("start", "agents", "steps", "left"),
    [
        (formed, 2, each_read, Left(depth=6, failures=2, ticks=3)),
        (formed, 3, each_read, Left(depth=4, failures=2, ticks=2)),
        (host_lost, 3, each_read, Left(depth=4, failures=1, ticks=1)),
        (proposed, 3, each_read, Left(depth=5, failures=1, ticks=1)),
        (proposed, 4, each_read, Left(depth=4, failures=1, ticks=0)),
        (committed_alone, 3, each_round, Left(depth=7, failures=1)),
        (formed, 2, each_round, Left(depth=6, failures=2)),
        (formed, 3, each_round, Left(depth=7, failures=1)),
        (formed, 4, each_round, Left(depth=4, failures=1)),
        pytest.param(formed, 2, each_read, Left(depth=12, failures=2, ticks=6), marks=full),
        pytest.param(host_lost, 3, each_read, Left(depth=7, failures=2, ticks=2), marks=full),
        pytest.param(proposed, 4, each_read, Left(depth=6, failures=2, ticks=1), marks=full),
        pytest.param(formed, 2, each_round, Left(depth=9, failures=2, losses=4), marks=full),
        # A lost record makes so many more states that these are as deep as 2 GB and minutes allow.
        pytest.param(formed, 3, each_round, Left(depth=4, failures=2, losses=1), marks=full),
        pytest.param(formed, 4, each_round, Left(depth=6, failures=2), marks=full),
        pytest.param(formed, 4, each_round, Left(depth=7, failures=1, losses=1), marks=full),
    ],
)
@pytest.mark.timeout(3600)
def test_no_violation_is_found(start: Callable[[int], World], agents: int, steps: Steps, left: Left) -> None:
    visited = search(start(agents), left, steps)
    print(f"{start.__name__}, {agents} agents, {steps.__name__}, {left}: {visited} states")
    assert visited > 50


def of_two(agents: int) -> World:
    return formed(agents, OF_TWO)


def of_two_proposed(agents: int) -> World:
    return proposed(agents, OF_TWO)


@pytest.mark.parametrize(
    ("start", "agents", "steps", "left"),
    [
        (of_two_proposed, 3, each_read, Left(depth=5, failures=1, ticks=1)),
        (of_two, 2, each_round, Left(depth=6, failures=2)),
        (of_two, 3, each_round, Left(depth=6, failures=1)),
        pytest.param(of_two, 3, each_round, Left(depth=4, failures=2, losses=1), marks=full),
        pytest.param(of_two, 4, each_round, Left(depth=6, failures=2), marks=full),
        pytest.param(of_two_proposed, 4, each_read, Left(depth=5, failures=1, ticks=1), marks=full),
    ],
)
@pytest.mark.timeout(3600)
def test_none_is_found_with_two_replicas(start: Callable[[int], World], agents: int, steps: Steps, left: Left) -> None:
    """Also of what World._check_replicas asks; uneven replicas are evened out within these depths."""
    visited = search(start(agents), left, steps)
    print(f"{start.__name__}, {agents} agents, {steps.__name__}, {left}: {visited} states")
    assert visited > 50


# Broken machines. ----------------------------------------------------------------------------------------------------


class NoWait(Rules):
    """Evicts without waiting for leases to end."""

    @property
    def evict_s(self) -> float:
        return 0.0


def forgetful(state: State, event: Event, now: float) -> tuple[State, tuple[Effect, ...]]:
    """Writes a new generation down, and no vote."""
    after, effects = membership.advance(state, event, now)
    new = after.number != state.number
    return after, tuple(e for e in effects if new or not isinstance(e, Persist))


def test_a_quorum_of_half_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    world = formed(2)
    monkeypatch.setattr(leader, "decides", lambda members, votes, tie: 2 * votes >= members)
    with pytest.raises(Violation, match=r"two generations|alive"):
        search(world, Left(depth=9, losses=5), each_round)


def test_eviction_without_a_wait_is_caught() -> None:
    hasty = NoWait(min_nodes=1, max_nodes=4, job="j", fingerprint={}, lease_s=2.0, join_debounce_s=0.0)
    with pytest.raises(Violation, match="alive"):
        search(formed_by(hasty), Left(depth=6, losses=3), each_round)


def test_a_vote_that_is_not_on_disk_before_it_is_sent_is_caught() -> None:
    with pytest.raises(Violation, match="two generations"):
        search(committed_alone(3, forgetful).crash("a"), Left(depth=8, failures=1), each_round, forgetful)


def test_a_leader_that_does_not_adopt_the_accepted_change_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def forget(campaign: Any, /, **changes: Any) -> Any:
        return replace(campaign, **changes | ({"adopted": None} if "adopted" in changes else {}))

    world = committed_alone(3)
    monkeypatch.setattr(leader, "replace", forget)
    with pytest.raises(Violation, match="two generations"):
        search(world, Left(depth=8, failures=1), each_round)


def test_a_group_that_keeps_its_name_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "replace", lambda old, workers, since: replace(old, workers=workers))
    with pytest.raises(Violation, match="two groups of one name"):
        search(of_two_proposed(3), Left(depth=5), each_read)


def formed_by(rules: Rules) -> World:
    """Three agents that go on by other rules from here."""
    world = formed(3)
    places = tuple(replace(p, state=replace(p.state, rules=rules)) for p in world.places if p.state)
    return replace(world, places=places, rules=rules)
