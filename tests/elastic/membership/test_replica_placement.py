"""Workers in replicas: by hand, and by random histories against what the rules say, worked out another way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_lsopt.elastic.membership.generation import Change, Generation, Member
from elastic_lsopt.elastic.membership.placement import Replica, after, place, uneven, vacant

pytestmark = pytest.mark.fast


def words(text: str) -> list[list[str]]:
    """ "a1 a2 | b1" -> [[a1, a2], [b1]]."""
    return [part.split() for part in text.split("|")]


@pytest.mark.parametrize(
    ("before", "nodes", "move", "placed"),
    [
        (" | ", "a1 a2 | b1 b2", True, "a1 a2 | b1 b2"),  # the workers of a node together
        (" | ", "a1 a2 | b1", True, "a1 a2 | b1"),
        (" | ", "a1 a2", True, "a1 | a2"),  # no replica is vacant where that can be
        (" | ", "a1", True, "a1 | "),
        (" | | ", "a1 a2 a3 a4 a5", True, "a1 a2 | a3 a4 | a5"),
        (" | ", "a1 a2 a3 | b1", True, "a1 a2 | a3 b1"),
        ("a1 a2 | b1 b2", "a1 a2 | b2", False, "a1 a2 | b2"),  # nobody moves for a gap of one
        ("a1 a2 | b1 b2", "a1 a2 | b2 b3", False, "a1 a2 | b2 b3"),
        ("a1 | b1", "a1 | b1 b2", True, "a1 | b1 b2"),  # at a tie to those of his node,
        ("a1 | b1", "a1 | b1 | c1", True, "a1 c1 | b1"),  # else to the lowest
        ("a1 a2 | b1 b2", "a1 a2", False, "a1 a2 | "),  # after a death a replica stays vacant,
        ("a1 a2 | ", "a1 a2 a3", False, "a1 a2 | a3"),  # and newcomers fill it,
        ("a1 a2 | ", "a1 a2 | c1 c2", True, "a1 a2 | c1 c2"),
        ("a1 a2 | b1 b2", "a1 a2", True, "a1 | a2"),  # but where they left as planned nobody will come
        ("a1 a2 a3 | b1 b2 b3 | ", "a1 a2 a3 | b1 b2 b3", True, "a1 a2 | b1 b2 | a3 b3"),
        ("a1 a2 a3 a4 | b1", "a1 a2 a3 a4 | b1 b2", True, "a1 a2 a3 | a4 b1 b2"),
    ],
)
def test_by_hand(before: str, nodes: str, move: bool, placed: str) -> None:
    found = place(words(before), words(nodes), move=move)
    assert [list(workers) for workers in found] == words(placed)


History = list[tuple[list[int], list[int], bool]]
"""What happens: workers that go (by number among the living), how many come on each node, whether anybody died."""
histories = st.lists(
    st.tuples(
        st.lists(st.integers(0, 50), max_size=6), st.lists(st.integers(0, 4), min_size=4, max_size=4), st.booleans()
    ),
    max_size=12,
)


def sizes(replicas: Sequence[Sequence[str]]) -> list[int]:
    return [len(workers) for workers in replicas]


def least_moves(kept: list[int], newcomers: int, *, move: bool) -> tuple[Counter[int], int]:
    """The sizes that the replicas must come to, and how many workers have to move: one at a time, the plain way."""
    found = list(kept)
    for _ in range(newcomers):
        found[found.index(min(found))] += 1
    moves = 0
    while move and max(found) - min(found) > 1:
        found[found.index(max(found))] -= 1
        found[found.index(min(found))] += 1
        moves += 1
    return Counter(found), moves


@settings(max_examples=300)
@given(count=st.integers(2, 5), history=histories)
def test_random_histories(count: int, history: History) -> None:
    """Everyone in one replica; nobody moves without need and as few as possible; sizes as even as the plain way."""
    before: tuple[tuple[str, ...], ...] = ((),) * count
    nodes: list[list[str]] = [[] for _ in range(4)]
    spawned = 0
    for going, coming, died in history:
        everyone = [w for node in nodes for w in node]
        gone = {everyone[i % len(everyone)] for i in going} if everyone else set()
        nodes = [[w for w in node if w not in gone] for node in nodes]
        survivors = {w for node in nodes for w in node}
        for node, more in zip(nodes, coming, strict=True):
            node += [f"{spawned + i}" for i in range(more)]
            spawned += more
        move = not died
        found = place(before, nodes, move=move)
        assert place(before, nodes, move=move) == found
        ordered = [w for node in nodes for w in node]
        assert sorted(w for r in found for w in r) == sorted(ordered)
        assert all(list(r) == [w for w in ordered if w in r] for r in found), "in the order of the job's ranks"
        was = {w: k for k, r in enumerate(before) for w in r}
        moved = [w for k, r in enumerate(found) for w in r if w in survivors and was[w] != k]
        kept = [sum(w in survivors for w in r) for r in before]
        expected, moves = least_moves(kept, len(ordered) - len(survivors), move=move)
        assert Counter(sizes(found)) == expected and len(moved) == moves
        if move:
            assert max(sizes(found)) - min(sizes(found)) <= 1
        before = found


@given(count=st.integers(2, 4), per_node=st.integers(1, 4), share=st.integers(1, 3), order=st.randoms())
def test_a_nodes_workers_stay_together_where_nodes_fill_replicas(count: int, per_node: int, share: int, order) -> None:
    """`share` nodes make a replica: no replica is split over more of them, in whatever order they came together."""
    nodes = [[f"{n}.{i}" for i in range(per_node)] for n in range(count * share)]
    order.shuffle(nodes)
    found = place(((),) * count, nodes, move=True)
    assert sizes(found) == [per_node * share] * count
    assert all(len({w.split(".")[0] for w in workers}) == share for workers in found)


def test_a_replica_is_named_by_the_generation_that_formed_it() -> None:
    first = after(vacant(2), words("a1 a2 | b1 b2"), 1, move=True)
    assert first == (Replica(("a1", "a2"), 1), Replica(("b1", "b2"), 1))
    second = after(first, words("a1 a2 | b2"), 2, move=False)
    assert second == (first[0], Replica(("b2",), 2))
    assert after(second, words("a1 a2 | b2"), 3, move=False, anew=[1]) == (first[0], Replica(("b2",), 3))
    assert vacant(1) == () and not uneven(()) and not uneven(second) and uneven((Replica(("a", "b")), Replica()))


def generation(replicas: int = 2) -> Generation:
    founded = Generation(0, 0, "a", (Member("a", "a:1", ()),), "", (), running=False, replicas=vacant(replicas))
    both = (Member("a", "a:1", ("a1", "a2")), Member("b", "b:1", ("b1", "b2")))
    return founded.after(Change("", "a", 0, running=True, joined=both))


def epochs(each: Generation) -> list[int]:
    return [r.since for r in each.replicas]


def test_a_generation_carries_its_replicas() -> None:
    first = generation()
    assert [r.workers for r in first.replicas] == [("a1", "a2"), ("b1", "b2")] and first.store_since == 1
    died = first.after(Change("", "a", 0, running=True, gone=("b1",)))
    assert epochs(died) == [1, 2]
    lost = died.after(Change("", "b", 0, running=True, evicted=("a",)))
    assert [r.workers for r in lost.replicas] == [(), ("b2",)] and epochs(lost) == [3, 2] and lost.store_since == 3
    everyone = tuple(w for _, w in lost.ranks)
    over = lost.after(Change("", "b", 0, running=False, gone=everyone))
    assert over.store_since == 4, "what was said before is of a job that is over"
    paused = died.after(Change("", "a", 0, running=False, left=("b",)))
    assert epochs(paused) == [3, 3], "nobody rides through a pause"
    assert epochs(paused.after(Change("", "a", 0, running=True))) == [4, 4]
    assert epochs(first.after(Change("", "a", 0, running=True, broken=(0,)))) == [2, 1]
    for each in (first, died, lost, over, paused):
        assert Generation.from_json(each.to_json()) == each == Generation.from_bytes(each.to_bytes())


def test_a_job_of_one_replica_says_nothing_of_replicas() -> None:
    one = generation(1)
    assert one.replicas == () and one.after(Change("", "b", 0, running=True, evicted=("a",))).store_since == 0
    assert set(one.to_json()) == {"number", "term", "host", "members", "why", "gone", "running"}
    assert Generation.from_json(one.to_json()) == one


@given(st.lists(st.integers(0, 2), max_size=8))
def test_a_name_means_the_same_workers_for_ever(events: list[int]) -> None:
    """(replica, since) names a group in a store: two groups of one name would mix."""
    history, spawned = [generation()], 0
    for event in events:
        now = history[-1]
        victims = [w for _, w in now.ranks]
        if event == 0 and victims:
            history.append(now.after(Change("", "a", 0, running=True, gone=(victims[0],))))
        elif event == 1:
            spawned += 1
            member = Member("b", "b:1", (f"x{spawned}",))
            history.append(now.after(Change("", "a", 0, running=True, joined=(member,))))
        else:
            history.append(now.after(Change("", "a", 0, running=not now.running)))
    named = {(k, r.since): r.workers for g in history for k, r in enumerate(g.replicas)}
    for g in history:
        assert all(named[k, r.since] == r.workers for k, r in enumerate(g.replicas))
    for g, h in pairwise(history):
        assert all(r.since in (s.since, h.number) for r, s in zip(h.replicas, g.replicas, strict=True))
