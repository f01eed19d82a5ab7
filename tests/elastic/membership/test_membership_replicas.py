"""The membership machine in a job of several replicas: what changes whom, on a healthy network."""

from __future__ import annotations

from typing import Any

import pytest

from elastic_lsopt.elastic.membership import machine as membership
from elastic_lsopt.elastic.membership.generation import Generation
from elastic_lsopt.elastic.membership.record import Broken, Drain, Rules
from elastic_lsopt.errors import UserError
from tests.elastic.membership.model import Place, World, begin

pytestmark = pytest.mark.fast
EVEN_OUT_S = 20.0


def rules(**more: Any) -> Rules:
    values = {
        "min_nodes": 1, "max_nodes": 6, "job": "j", "fingerprint": {"code": "1"}, "replicas": 2,
        "even_out_s": EVEN_OUT_S,
    }  # fmt: skip
    return Rules(**{**values, **more})


def newest(world: World) -> Generation:
    return world.decided[-1]


def workers(world: World) -> list[tuple[str, ...]]:
    return [r.workers for r in newest(world).replicas]


def epochs(world: World) -> list[int]:
    return [r.since for r in newest(world).replicas]


def test_a_job_begins_when_each_replica_has_a_worker() -> None:
    """Else one would begin, and the other come as a newcomer, by which worker happened to be ready first."""
    world = World((Place("a", membership.found("a", "a", rules(replicas=3))),), rules(replicas=3))
    for _ in range(2):
        world = world.spawn("a").run(2.0, respawn=False)
        assert not newest(world).running and workers(world) == [(), (), ()]
    world = world.spawn("a").run(2.0, respawn=False)
    assert newest(world).running and workers(world) == [("a0",), ("a1",), ("a2",)]
    assert epochs(world) == [newest(world).number] * 3


def test_a_job_that_goes_on_does_so_with_fewer() -> None:
    world = begin(2, rules()).kill_worker("b").run(3.0, respawn=False)
    assert newest(world).running and workers(world) == [("a0",), ()]


def four() -> World:
    world = begin(4, rules())
    assert workers(world) == [("a0", "b0"), ("c0", "d0")] and epochs(world) == [1, 1]
    return world


def test_a_death_is_news_for_its_own_replica_alone() -> None:
    world = four().kill_worker("d").run(1.0, respawn=False)
    assert workers(world) == [("a0", "b0"), ("c0",)] and epochs(world) == [1, newest(world).number]
    second = newest(world).number
    world = world.crash("a").run(8.0, respawn=False)
    assert workers(world) == [("b0",), ("c0",)] and epochs(world) == [newest(world).number, second]
    assert newest(world).store_since == newest(world).number


def test_uneven_replicas_are_evened_out_after_a_while() -> None:
    """At once somebody would be moved whose place a newcomer, on its way, fills."""
    lost = four().kill_worker("c").kill_worker("d").run(EVEN_OUT_S / 2, respawn=False)
    assert workers(lost) == [("a0", "b0"), ()]
    world = lost.run(EVEN_OUT_S, respawn=False)
    assert workers(world) == [("a0",), ("b0",)] and newest(world).why == "workers move to smaller replicas"
    number = newest(world).number
    assert newest(world.run(2 * EVEN_OUT_S, respawn=False)).number == number
    world = lost.spawn("c").run(2.0, respawn=False).spawn("d").run(2 * EVEN_OUT_S, respawn=False)
    assert workers(world) == [("a0", "b0"), ("c1", "d1")] and epochs(world)[0] == 1, "newcomers came first"


def test_who_leaves_as_planned_is_not_waited_for() -> None:
    world = four().give("d", Drain()).give("c", Drain()).run(2.0, respawn=False)
    assert workers(world) == [("a0",), ("b0",)]


def test_a_broken_replica_forms_anew_alone() -> None:
    world = four().give("c", Broken(1, 1)).run(3.0)
    assert epochs(world) == [1, newest(world).number] and newest(world).number == 2
    assert newest(world).why == "a collective broke" and workers(world) == workers(four())
    again = world.give("c", Broken(1, 1)).give("d", Broken(1, 1)).run(3.0)
    assert newest(again) == newest(world), "it has formed anew since"


def test_a_broken_replica_is_not_forgotten_in_a_change_that_leaves_it_as_it_is() -> None:
    world = four().kill_worker("a")  # the proposal is out
    world = world.give("d", Broken(1, 1)).run(3.0, respawn=False)
    one, two = (g for g in world.decided if g.number > 1)
    assert (one.gone, [r.since for r in one.replicas]) == (("a0",), [2, 1])
    assert two.why == "a collective broke" and [r.since for r in two.replicas] == [2, 3]


@pytest.mark.parametrize("first", ["a", "b"])
def test_everybody_knows_when_all_are_leaving(first: str) -> None:
    """A flag in one replica's steps would not reach the other; and who is let go before has its replica's state."""

    def told(world: World) -> list[bool]:
        return [membership.view(p.state, p.clock_s).dissolving for p in world.places if p.state]

    world = begin(2, rules())
    for name in sorted("ab", key=lambda name: name != first):
        assert told(world) == [False, False]
        world = world.give(name, Drain()).tick(0.1).flush()
    world = world.run(2.0, respawn=False)
    assert told(world) == [True, True] and newest(world).number == 1
    one = begin(2, rules()).give(first, Drain()).run(2.0, respawn=False)
    assert first not in newest(one).member


def test_replicas_are_at_least_one() -> None:
    with pytest.raises(UserError, match="replicas=0 must be >= 1"):
        rules(replicas=0)
