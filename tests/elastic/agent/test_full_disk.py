"""A node whose disk cannot be written gives no vote, keeps its lease and its workers, and goes on when it can be."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from elastic_lsopt.elastic.membership.quorum import Ballot
from elastic_lsopt.elastic.membership.record import Drain
from tests.elastic.membership.model import World, begin
from tests.elastic.membership.search import Left, Steps, each_read, each_round, search
from tests.elastic.membership.test_membership_search import RULES, committed_alone, formed, host_lost, proposed

pytestmark = pytest.mark.fast


def full(start: Callable[[int], World], names: str) -> Callable[[int], World]:
    return lambda agents: start(agents).fill(*names)


@pytest.mark.long
@pytest.mark.parametrize(
    ("start", "names", "agents", "steps", "left"),
    [
        (formed, "b", 2, each_read, Left(depth=6, failures=2, ticks=3)),
        (host_lost, "b", 3, each_read, Left(depth=4, failures=1, ticks=1)),
        (proposed, "b", 3, each_read, Left(depth=4, failures=1, ticks=1)),
        (committed_alone, "bc", 3, each_round, Left(depth=6, failures=1)),
        (committed_alone, "a", 3, each_round, Left(depth=6, failures=1)),
        (formed, "b", 3, each_round, Left(depth=6, failures=1)),
        (formed, "abc", 3, each_round, Left(depth=6, failures=1)),
    ],
)
def test_no_violation_is_found(
    start: Callable[[int], World], names: str, agents: int, steps: Steps, left: Left
) -> None:
    visited = search(full(start, names)(agents), left, steps)
    print(f"{start.__name__}, {agents} agents, {names} full, {steps.__name__}, {left}: {visited} states")
    assert visited > 50


def test_a_worker_dies_where_no_vote_can_be_written() -> None:
    """All disks are full: nothing is decided and nobody else's worker is lost; then one round trip decides."""
    world = begin(3, RULES)
    number = world.decided[-1].number
    world = world.fill("a", "b", "c").kill_worker("b").run(5 * RULES.lease_s, respawn=False)
    assert world.decided[-1].number == number
    assert [bool(p.alive) for p in world.places] == [True, False, True]
    assert all(p.disk and p.disk.generation.number == number for p in world.places)
    world = world.fill().run(RULES.lease_s, respawn=False)
    assert world.decided[-1].gone == ("b0",) and [bool(p.alive) for p in world.places] == [True, False, True]


def test_a_majority_decides_without_the_one_whose_disk_is_full() -> None:
    """It enters what the others decide, unwritten; it crashes, finds the old generation on its disk, and comes back."""
    world = begin(3, RULES).fill("c").kill_worker("b").run(RULES.lease_s, respawn=False)
    after = world.decided[-1]
    place = world.place("c")
    assert after.gone == ("b0",) and place.state and place.state.number == after.number and place.alive
    assert place.disk and place.disk.generation.number == after.number - 1
    world = world.crash("c").restart("c").run(5 * RULES.lease_s)
    assert world.place("c").state and world.settled()


def test_no_promise_and_no_candidacy_comes_from_a_full_disk() -> None:
    world = begin(3, RULES).crash("a").fill("b", "c").run(5 * RULES.lease_s, respawn=False)
    for name in "bc":
        place = world.place(name)
        assert place.state and place.state.vote and place.state.vote.promised == Ballot(0, "a")
        assert not place.alive, "their lease has ended, as without a quorum it must"
    assert world.fill().run(5 * RULES.lease_s).decided[-1].host in "bc"


def test_a_node_with_a_full_disk_may_leave() -> None:
    world = begin(3, RULES).fill("c").give("c", Drain()).flush()
    assert "c" not in world.decided[-1].member
    world = world.kill_worker("c").run(RULES.lease_s, respawn=False)  # it was told to go
    assert world.place("c").state.ended  # type: ignore[union-attr]
