"""Each rule of the membership machine by itself, on a healthy network unless it says otherwise."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic_lsopt.elastic.membership import machine as membership
from elastic_lsopt.elastic.membership.generation import Change, Generation, Member
from elastic_lsopt.elastic.membership.quorum import Ask, Ballot, Vote, WitnessVote, decides, quorum_time
from elastic_lsopt.elastic.membership.record import (
    Broken,
    Drain,
    DrainWorker,
    Effect,
    Finished,
    Heard,
    Heartbeat,
    Publish,
    Record,
    Rules,
    Tick,
    WorkerReady,
)
from elastic_lsopt.elastic.membership.shared_map import Table
from elastic_lsopt.elastic.membership.state import State
from elastic_lsopt.errors import UserError
from tests.elastic.membership.model import Place, World, begin

pytestmark = pytest.mark.fast


def rules(**more: Any) -> Rules:
    return Rules(**{"min_nodes": 1, "max_nodes": 4, "job": "j", "fingerprint": {"code": "1"}, **more})


def newest(world: World) -> Generation:
    return world.decided[-1]


def test_ranks_keep_their_order_and_newcomers_come_last() -> None:
    before = Generation(4, 0, "a", tuple(Member(n, n, (f"{n}0", f"{n}1")) for n in "abc"), "", (), running=True)
    change = Change(
        "", "a", 0, True, evicted=("b",), gone=("a0",), joined=(Member("d", "d", ("d0",)), Member("c", "c", ("c2",)))
    )
    after = before.after(change)
    assert after.ranks == (("a", "a1"), ("c", "c0"), ("c", "c1"), ("c", "c2"), ("d", "d0"))
    assert (after.number, after.gone) == (5, ("a0", "b0", "b1"))
    assert Generation.from_json(after.to_json()) == after


def test_json_names_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="workers"):
        Member.from_json({"name": "a", "address": "b", "workers": [1]})
    with pytest.raises(ValueError, match="address"):
        Member.from_json({"name": "a", "workers": []})


def test_a_record_survives_json() -> None:
    _, effects = membership.advance(begin(3, rules()).place("b").state, Tick(), 1e3)  # type: ignore[arg-type]
    record = next(e.record for e in effects if isinstance(e, Publish))
    assert Record.from_json(record.to_json()) == record


@given(n=st.integers(1, 7), votes=st.sets(st.integers(0, 6)), others=st.sets(st.integers(0, 6)), tie=st.integers(0, 6))
def test_two_quorums_share_a_voter(n: int, votes: set[int], others: set[int], tie: int) -> None:
    first, second = ({v for v in s if v < n} for s in (votes, others))
    if decides(n, len(first), tie % n in first) and decides(n, len(second), tie % n in second):
        assert first & second


@given(times=st.lists(st.integers(0, 9), min_size=1, max_size=6), tie=st.integers(0, 5))
def test_quorum_time_is_the_latest_that_decides(times: list[int], tie: int) -> None:
    tie %= len(times)
    expected = max(t for t in times if decides(len(times), sum(u >= t for u in times), times[tie] >= t))
    assert quorum_time(times, times[tie]) == expected


def test_an_acceptor_gives_no_vote_below_its_promise() -> None:
    change = Change("", "a", 0, running=True)
    vote = Vote(Ballot(0, "a")).answer(Ask(Ballot(2, "c")))
    assert vote.answer(Ask(Ballot(1, "d"), change)) == vote
    assert vote.answer(Ask(Ballot(2, "c"), change)).accepted == (Ballot(2, "c"), change)
    stored = WitnessVote.answer(None, 5, Ask(Ballot(1, "b")))
    assert WitnessVote.answer(stored, 4, Ask(Ballot(9, "z"))) == stored


@given(st.lists(st.tuples(st.integers(0, 300), st.booleans()), max_size=400))
def test_a_table_is_a_dict(changes: list[tuple[int, bool]]) -> None:
    table, plain = Table[int](), {}
    for i, (name, keep) in enumerate(changes):
        table = table.put(str(name), i) if keep else table.without(str(name))
        plain = {**plain, str(name): i} if keep else {k: v for k, v in plain.items() if k != str(name)}
        assert len(table) == len(plain) and table.get(str(name)) == plain.get(str(name))
    assert dict(table) == plain


def test_min_nodes_are_awaited_and_max_nodes_kept() -> None:
    world = begin(2, rules(min_nodes=2, max_nodes=2), spares=1)
    assert [(g.number, g.running) for g in world.decided] == [(0, False), (1, True)]
    world = world.spawn("c").run(4.0)
    assert len(newest(world).members) == 2
    world = world.crash("b").run(6.0)
    assert [m.name for m in newest(world).members] == ["a", "c"] and newest(world).running


def test_too_few_nodes_wait_with_their_workers_alive() -> None:
    world = begin(3, rules(min_nodes=3)).crash("c").run(6.0, respawn=False)
    assert not newest(world).running and world.place("a").alive == {"a0"} and world.place("b").alive == {"b0"}


def test_a_reaped_worker_is_out_in_one_round_trip() -> None:
    world = begin(3, rules()).kill_worker("b").flush()
    assert newest(world).gone == ("b0",) and len(newest(world).members) == 3


@pytest.mark.parametrize("name", ["a", "c"])
def test_a_drained_node_leaves_and_nothing_is_gone(name: str) -> None:
    world = begin(3, rules()).give(name, Drain()).flush()
    assert name not in newest(world).member and newest(world).gone == ()
    assert newest(world).host != name and not world.place(name).state.ended  # type: ignore[union-attr]
    world = world.kill_worker(name).run(2.0, respawn=False)
    assert world.place(name).state.ended  # type: ignore[union-attr]


@pytest.mark.parametrize("event", [Drain(), DrainWorker("b0")], ids=["node", "worker"])
def test_who_leaves_waits_for_the_generation_after_a_death(event: Any) -> None:
    """He may hold the only copy of what the dead one mirrored, and hands over in a change without a death only."""
    world = begin(5, rules(max_nodes=5))
    number = newest(world).number
    # While the leader's proposal for its own worker is out, b is told to go and c's worker dies.
    world = world.kill_worker("a").give("b", event).kill_worker("c").run(1.0, respawn=False)
    one, two, three = (g for g in world.decided if g.number > number)
    assert (one.gone, two.gone, three.gone) == (("a0",), ("c0",), ())
    assert ("b", "b0") in two.ranks and ("b", "b0") not in three.ranks and ("d", "d0") in three.ranks


def test_a_drained_worker_is_not_gone() -> None:
    world = begin(2, rules()).give("b", DrainWorker("b0")).flush()
    assert newest(world).member["b"].workers == () and newest(world).gone == ()


@pytest.mark.parametrize("names", ["a", "b", "cab"])
def test_a_broken_collective_forms_the_same_members_anew_once(names: str) -> None:
    before = newest(world := begin(3, rules()))
    for name in names:
        world = world.give(name, Broken(before.number))
    world = world.run(4.0)
    after = newest(world)
    assert (after.number, after.ranks, after.gone) == (before.number + 1, before.ranks, ())
    assert after.why == "a collective broke"


def test_a_collective_that_broke_by_a_death_is_no_further_news() -> None:
    world = begin(3, rules()).kill_worker("c").flush()
    number = newest(world).number
    assert newest(world.give("b", Broken(number - 1)).run(4.0, respawn=False)).number == number


def test_a_worker_that_is_ready_without_a_lease_waits_for_one() -> None:
    """It is neither offered nor killed; else deaths and joins would follow each other faster than any lease comes."""
    place = begin(3, rules()).place("b")
    assert place.state is not None
    late_s = place.clock_s + 9.0
    state, _ = membership.advance(place.state, Tick(), late_s)
    assert state.workers == ()
    state, effects = membership.advance(state, WorkerReady("b1"), late_s)
    assert (state.waiting, state.workers, effects) == (("b1",), (), ())
    granted = replace(state, lease_until_s=late_s + 2.0)
    state, effects = membership.advance(granted, Tick(), late_s + 0.1)
    assert state.workers == ("b1",) and any(isinstance(e, Publish) and e.record.workers for e in effects)


def test_who_came_while_nobody_led_is_let_in() -> None:
    """The host had promised itself to another candidate when he spoke. No worker lives whose death would let him in."""
    world = begin(3, rules(max_nodes=5), spares=1)
    for name in "abc":
        world = world.kill_worker(name).flush()
    while world.place("b").state.campaign is None:  # type: ignore[union-attr]
        world = replace(world, mail=()).tick(rules().heartbeat_s, asleep=frozenset("acd"))
    world = world.deliver("b", "a", 0)
    assert world.place("a").state.campaign is None  # type: ignore[union-attr]
    world = replace(world.crash("b"), mail=()).spawn("d").flush()
    while not world.place("a").state.campaign:  # type: ignore[union-attr]
        world = world.tick(rules().heartbeat_s, asleep=frozenset("c")).flush()
    world = world.run(4.0, respawn=False)
    let_in = next(g for g in world.decided if "d" in g.member)
    assert (let_in.why, let_in.host, "b" in let_in.member) == ("joined: d", "a", True)


@pytest.mark.parametrize("first", ["a", "b"])
def test_the_end_is_one_members_word(first: str) -> None:
    """Workers finish after a barrier of all, so one is enough: also where a newcomer was let in since then."""
    world = begin(3, rules(), spares=1).spawn("d").run(1.0)
    assert "d" in newest(world).member
    world = world.give(first, Finished()).run(1.0, respawn=False)
    assert newest(world).why == "finished"
    for name in sorted({*"abcd"} - {first}):  # their workers end when they hear of it
        world = world.give(name, Finished()).flush()
    assert all(p.state and p.state.ended for p in world.run(1.0, respawn=False).places)


@pytest.mark.parametrize(
    ("other", "named"), [({"fingerprint": {"code": "2"}}, "code is 2 on x but 1"), ({"job": "k"}, "job 'k' is not")]
)
def test_a_stranger_is_refused_and_disturbs_nobody(other: dict[str, Any], named: str) -> None:
    world = begin(2, rules())
    stranger = Place("x", membership.newcomer("x", "x", rules(**other), "a"), clock_s=world.places[0].clock_s)
    state, effects = membership.advance(stranger.state, Tick(), 0.0)  # type: ignore[arg-type]
    record = next(e.record for e in effects if isinstance(e, Publish))
    host = world.place("a")
    assert host.state is not None
    after, answers = membership.advance(host.state, Heard((record,)), host.clock_s)
    assert after.generation == host.state.generation and "x" not in after.peers
    refusal = next(e.record for e in answers if isinstance(e, Publish))
    ended, left = membership.advance(state, Heard((refusal,)), 1.0)
    assert ended.ended and named in str(left)


def test_a_refusal_is_for_the_agent_that_asked() -> None:
    """Not for one of its name that comes after it, mended: a letter may still lie there for its predecessor."""
    world = begin(2, rules())
    host, wrong = world.place("a"), rules(fingerprint={"code": "2"})
    assert host.state is not None

    def asks(agent: State) -> Record:
        _, effects = membership.advance(agent, Tick(), 0.0)
        return next(e.record for e in effects if isinstance(e, Publish))

    before = membership.newcomer("x", "x", wrong, "a", incarnation=7)
    _, answers = membership.advance(host.state, Heard((asks(before),)), host.clock_s)
    refusal = next(e.record for e in answers if isinstance(e, Publish))
    after = membership.newcomer("x", "x", rules(), "a", incarnation=8)
    for agent, ends in ((before, True), (after, False)):
        asked, _ = membership.advance(agent, Tick(), 0.0)
        heard, _ = membership.advance(asked, Heard((refusal,)), 0.1)
        assert heard.ended is ends


@pytest.mark.parametrize("one_dies", [False, True])
def test_beats_that_come_together_are_answered_as_each_alone(one_dies: bool) -> None:
    """By the same words but for the number of the answer; a record among them that is none is heard in its place."""
    world = begin(4, rules()).run(2.0).tick(rules().heartbeat_s)
    if one_dies:
        world = world.kill_worker("c")
    host = world.place("a")
    assert host.state is not None and host.state.leads
    records = tuple(mail[-1] for (writer, reader), mail in world.mail if reader == "a" and writer in "bcd" and mail)
    assert len(records) == 3
    state, effects = membership.advance(host.state, Heard(records), host.clock_s)
    in_turn, each = host.state, list[Effect]()
    for record in records:
        in_turn, more = membership.advance(in_turn, Heard((record,)), host.clock_s)
        each += more
    assert replace(state, heartbeats=0, saved=None) == replace(in_turn, heartbeats=0, saved=None)

    def said(effects: Iterable[Effect]) -> list[tuple[object, Record]]:
        return [(e.to, replace(e.record, heartbeat=Heartbeat(0, 0, 0.0))) for e in effects if isinstance(e, Publish)]

    assert said(effects) == said(each) and len(said(effects)) >= 3
    heartbeats = [(to, e.record.heartbeat) for e in effects if isinstance(e, Publish) for to in e.to]
    assert len(heartbeats) == len(set(heartbeats)), "to one reader no two answers have one number"


def test_rules_that_contradict_each_other() -> None:
    with pytest.raises(UserError, match="min_nodes=5 must be between 1 and max_nodes=4"):
        rules(min_nodes=5)


@pytest.mark.parametrize("witness", [None, "etcd"])
def test_a_tie_needs_the_tie_breaker(witness: str | None) -> None:
    world = begin(2, rules(witness=witness)).crash("a").run(8.0, respawn=False)
    assert newest(world).member.keys() == ({"b"} if witness else {"a", "b"})
    assert bool(world.place("b").alive) == bool(witness)


def test_the_state_is_hashable() -> None:
    world = begin(3, rules())
    assert all(isinstance(hash(p.state), int) for p in world.places)
    assert replace(world.places[0].state) == world.places[0].state  # type: ignore[type-var]
