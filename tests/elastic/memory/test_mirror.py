"""The mirror: who holds whose state, what is sent, and what happens when a peer falls silent or dies."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_lsopt.elastic.memory.mirror import Routes, hand_over_routes, mirrors_of, routes
from elastic_lsopt.elastic.memory.versions import Chunk

CASES = "tests.cases.elastic.elastic_state:"
NODES = st.lists(st.sampled_from("abcd"), min_size=1, max_size=8)


def shards(world: int) -> list[list[Chunk]]:
    """Sharded: each rank has one chunk of its own."""
    return [[("w", 10 * r, 10)] for r in range(world)]


def held_by(chunk: Chunk, own: list[list[Chunk]], sent: Routes) -> set[int]:
    return {r for r, chunks in enumerate(own) if chunk in chunks} | {t for (_, t), c in sent.items() if chunk in c}


def test_the_mirror_is_the_rank_of_the_same_place_on_the_next_node() -> None:
    assert [mirrors_of(r, "aabb", 1) for r in range(4)] == [[2], [3], [0], [1]]
    assert [mirrors_of(r, "aaabbcc", 2) for r in range(7)] == [[3, 5], [4, 6], [3, 5], [5, 0], [6, 1], [0, 3], [1, 4]]
    assert mirrors_of(0, "abcd", 2) == [1, 2]
    assert mirrors_of(0, "aaa", 2) == [1, 2]  # one node: other workers of it
    assert mirrors_of(0, "a", 1) == []


@pytest.mark.parametrize(("nodes", "ranks"), [(16, 8), (2, 8), (3, 1)])
def test_no_rank_mirrors_a_whole_node(nodes: int, ranks: int) -> None:
    names = [f"n{n}" for n in range(nodes) for _ in range(ranks)]
    sent = routes(shards(len(names)), names, 1)
    assert sorted(target for _, target in sent) == list(range(len(names)))


@settings(max_examples=200)
@given(NODES, st.integers(1, 3))
def test_each_shard_is_on_enough_nodes(nodes: list[str], copies: int) -> None:
    own = shards(len(nodes))
    sent = routes(own, nodes, copies)
    places = nodes if len(set(nodes)) > 1 else [str(r) for r in range(len(nodes))]
    for (chunk,) in own:
        on = [places[r] for r in held_by(chunk, own, sent)]
        assert len(set(on)) == min(copies + 1, len(set(places))) == len(on)


def test_what_replicas_hold_is_not_sent() -> None:
    assert routes([[("w", 0, 10)]] * 3, "abc", 2) == {}  # DDP
    hsdp = [[("w", 0, 5)], [("w", 5, 5)]] * 2
    assert routes(hsdp, "aabb", 1) == {}
    assert routes(hsdp, "abab", 1) == {(0, 1): [("w", 0, 5)], (1, 0): [("w", 5, 5)]}  # both replicas on one node


@settings(max_examples=300)
@given(st.data())
def test_after_a_hand_over_no_chunk_is_on_leavers_only(data: Any) -> None:
    nodes = data.draw(st.lists(st.sampled_from("abc"), min_size=2, max_size=7))
    leaving = sorted(data.draw(st.sets(st.integers(0, len(nodes) - 1), max_size=len(nodes) - 1)))
    own = shards(len(nodes))
    mirrored = routes(own, nodes, 1)
    handed = hand_over_routes(own, mirrored, leaving)
    stayers = set(range(len(nodes))) - set(leaving)
    for (chunk,) in own:
        before = held_by(chunk, own, mirrored) & stayers
        assert (held_by(chunk, own, mirrored) | held_by(chunk, own, handed)) & stayers
        assert not before or chunk not in [c for chunks in handed.values() for c in chunks]  # nothing else moves


def test_a_silent_peer_holds_up_no_close(ranks: Any) -> None:
    out = ranks(2).run(CASES + "silent_peer", seconds=1.0)
    assert "has not arrived within 1.0 s" in out[0]["said"]
    for r in out:
        assert r["close_s"] < 10.0 and not r["alive"] and not r["mirrored peers"]
    ranks(2).stop()  # its sockets were cut


def test_a_dead_peer_is_said_at_the_next_wait_and_what_had_arrived_stays(ranks: Any) -> None:
    out = ranks(2).run(CASES + "severed_peer")
    for r in out:
        assert "the mirror lost a peer" in r["said"] and r["waited_s"] < 5
        assert r["mirrored peers"] == [1] and r["kept"] == [2]
    ranks(2).stop()


def test_no_version_of_displaced_or_unsettled_weights(ranks: Any) -> None:
    for r in ranks(2).run(CASES + "refused_versions"):
        assert "perturbed" in r["said"][0] and "resync" in r["said"][1] and r["held"] == 0


@pytest.mark.full
def test_a_version_of_20_megabytes_costs_milliseconds(ranks: Any) -> None:
    for r in ranks(2).run(CASES + "version_cost", parameters=300, rows=105):
        assert r["take_ms"] < 100 and r["push_ms"] < 5, r
