"""The protocol of a meeting, replicas as threads: who sleeps through meetings, and who waits for long."""

from __future__ import annotations

import math
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist

from elastic_lsopt.backends.groups import gloo
from elastic_lsopt.backends.peers import meeting
from elastic_lsopt.backends.peers.circles import IDLE, Circles
from elastic_lsopt.backends.peers.meeting import Meetings, Met
from elastic_lsopt.errors import PeerFailed, UserError

pytestmark = pytest.mark.fast
LIMIT_S = 20.0


def store() -> dist.Store:
    made = dist.HashStore()
    made.set_timeout(timedelta(seconds=2))
    return made


def replica(shared: dist.Store, number: int, among: int = 3, timeout_s: float = 0.4) -> Meetings:
    made = Meetings(shared, number, range(among), first=True, inside=None, timeout_s=timeout_s)
    made.join()
    return made


def has_come(shared: dist.Store, number: int) -> None:
    """Wait until this replica has said that it is there for the first meeting."""
    end = time.monotonic() + LIMIT_S
    while not shared.check([f"0/ready/{number}"]):
        assert time.monotonic() < end, f"replica {number} does not come"
        time.sleep(0.01)


def test_who_sleeps_while_it_waits_for_others_finds_that_they_have_met_without_it() -> None:
    """It is in the meeting that has begun meanwhile, whose keys are gone when it wakes up. The others take it for lost
    at the end of that one, and wait for nobody but each other."""
    shared, slept, over = store(), threading.Event(), threading.Event()
    late = replica(shared, 2)
    wait = late._wait

    def sleeping(*args: Any) -> None:
        late._wait = wait  # type: ignore[method-assign]
        slept.set()
        assert over.wait(LIMIT_S)
        wait(*args)

    late._wait = sleeping  # type: ignore[method-assign]

    def others(number: int) -> list[Met | None]:
        me, out = replica(shared, number, timeout_s=LIMIT_S), list[Met | None]()
        assert slept.wait(LIMIT_S)
        for turn in range(5):
            met = me.begin({}, {"turn": turn}, version=turn)
            me.lost = lambda other: other == 2
            assert met is not None and me.end(met, well=True) == (turn > 0)
            out.append(met)
        return out

    with ThreadPoolExecutor(3) as threads:
        asleep = threads.submit(lambda: [late.begin({}, {}, version=0), late.begin({}, {"mine": 1}, version=0)])
        met = [threads.submit(others, number) for number in (0, 1)]
        try:
            found = [one.result(LIMIT_S) for one in met]
        finally:
            over.set()
        first, second = asleep.result(LIMIT_S)
    assert [[m.members for m in each if m is not None] for each in found] == [[(0, 1, 2)] + [(0, 1)] * 4] * 2
    assert first is None
    assert second is not None and second.number == 5 and second.members == (2,)


def test_ranks_that_hear_of_nothing_for_longer_than_their_group_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A replica of two ranks whose first has all the patience, and a group that breaks after three seconds."""
    monkeypatch.setattr(meeting, "SLICE_S", 0.1)
    shared, inside = store(), store()

    def rank(number: int) -> Met | None:
        group = gloo(inside, number, 2, timedelta(seconds=3))
        me = Meetings(shared, 0, (0, 1), first=number == 0, inside=group, timeout_s=0.4)
        if number == 0:
            me.join()
        return me.begin({}, patience_s=60.0)

    with ThreadPoolExecutor(2) as threads:
        waiting = [threads.submit(rank, number) for number in range(2)]
        has_come(shared, 0)
        time.sleep(3.5)
        other = replica(shared, 1, among=2).begin({})
        found = [one.result(LIMIT_S) for one in waiting]
    assert {met and met.members for met in (*found, other)} == {(0, 1)}


def test_a_circle_that_one_has_dropped_is_made_anew_once_in_a_meeting() -> None:
    shared = store()
    before = [{"0-1": 3}, {}]
    reports = {r: {"circles": before[r], "cut": [[(0, 0, 4)]]} for r in (0, 1)}
    earlier = {r: {"circles": {}, "cut": [[(0, 0, 4)]]} for r in (0, 1)}

    def member(number: int) -> list[Any]:
        circles, left, never = Circles((number, 0), shared), timedelta(seconds=LIMIT_S), lambda: False
        circles.of((0, 1), Met(3, (0, 1), earlier, None), left, never)
        if number == 1:
            circles.drop()
        return [circles.of((0, 1), Met(7, (0, 1), reports, None), left, never) for _ in range(3)]

    with ThreadPoolExecutor(2) as threads:
        for first, *others in threads.map(member, range(2)):
            assert all(one is first for one in others)


def test_nobody_waits_for_a_replica_that_is_known_to_be_lost() -> None:
    """Replica 1 dies whole between two meetings, and says nothing; who watches over it says so while others wait."""
    shared, gone = store(), threading.Event()
    both = [replica(shared, number, among=2, timeout_s=20.0) for number in range(2)]
    both[0].lost = lambda number: number == 1 and gone.is_set()
    with ThreadPoolExecutor(2) as threads:
        [*_] = threads.map(lambda me: me.end(me.begin({}), well=True), both)
        waiting = threads.submit(both[0].begin, {})
        time.sleep(0.3)
        assert not waiting.done()
        gone.set()
        begin = time.monotonic()
        met = waiting.result(LIMIT_S)
    assert met is not None and met.members == (0,) and time.monotonic() - begin < 5.0


def test_a_newcomer_whose_others_have_all_died_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """Signs of life keep it waiting; when they end, it does too, in one line."""
    monkeypatch.setattr(meeting, "SLICE_S", 0.1)
    monkeypatch.setattr(meeting, "SILENT_S", 0.6)
    monkeypatch.setattr(meeting, "BEAT_S", 0.0)
    shared, looks = store(), list[float]()
    other, new = replica(shared, 0, among=2), replica(shared, 1, among=2)
    silent = new._silent

    def look() -> bool:
        """The other's sign of life comes right before, so that no pause of this machine is a silence."""
        looks.append(time.monotonic())
        if looks[-1] < looks[0] + 1.5:
            other.beat()
        return silent()

    new._silent = look  # type: ignore[method-assign]
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(lambda: new.begin({}, patience_s=math.inf))
        with pytest.raises(UserError, match=r"^replica 1 waits to be given the model, and no other has taken a step"):
            waiting.result(LIMIT_S)
    assert looks[-1] >= looks[0] + 1.5, "signs of life did not keep it waiting"


def test_who_is_told_to_stop_while_it_waits_takes_its_word_back() -> None:
    """Nobody meets it, and it hears at once; the others meet without it."""
    shared, told = store(), threading.Event()
    stops = Meetings(shared, 0, range(2), first=True, inside=None, timeout_s=60.0, told_to_stop=told.is_set)
    stops.join()
    other = replica(shared, 1, among=2)
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(lambda: stops.begin({}))
        has_come(shared, 0)
        time.sleep(0.2)
        assert not waiting.done()
        told.set()
        assert waiting.result(LIMIT_S) is None and stops.stops
    met = other.begin({})
    assert met is not None and met.members == (1,)


def test_whose_members_are_about_to_change_takes_its_word_back() -> None:
    """The others would wait for it: its ranks form another group meanwhile."""
    shared, changes = store(), threading.Event()
    leaves = Meetings(shared, 0, range(2), first=True, inside=None, timeout_s=60.0, outdated=changes.is_set)
    leaves.join()
    other = replica(shared, 1, among=2)
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(lambda: leaves.begin({}))
        has_come(shared, 0)
        changes.set()
        with pytest.raises(PeerFailed, match="are about to change"):
            waiting.result(LIMIT_S)
    met = other.begin({})
    assert met is not None and met.members == (1,)


def test_who_has_come_and_died_is_not_in() -> None:
    """One of its ranks says that it is gone, and it is known again in its next life."""
    shared = store()
    died, other = replica(shared, 0, among=2, timeout_s=60.0), replica(shared, 1, among=2)
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(lambda: died.begin({}))
        has_come(shared, 0)
        died.leave()
        met = other.begin({})
        assert met is not None and met.members == (1,) and other.end(met, well=True)
        assert waiting.result(LIMIT_S) is None
    met = replica(shared, 0, among=2).begin({})
    assert met is not None and met.members == (0,)


def test_who_forms_anew_fails_the_meeting_in_which_it_was() -> None:
    """Its word was counted, and it left without knowing; another's meeting is none of its business."""
    shared = store()
    both = [replica(shared, number, among=2, timeout_s=60.0) for number in range(2)]
    with ThreadPoolExecutor(2) as threads:
        met, _ = threads.map(lambda me: me.begin({}), both)
        assert met is not None
        replica(shared, 2)
        assert not both[0].failed(met)
        replica(shared, 1, among=2)
        assert both[0].failed(met) and not both[0].end(met, well=True)


def test_a_death_fails_the_meeting_that_is_under_way() -> None:
    """Also where its groups are not made yet, which no connection tells of."""
    shared, reports = store(), {r: {"circles": {}, "cut": [[(0, 0, 4)]]} for r in (0, 1)}
    both = [replica(shared, number, among=2, timeout_s=60.0) for number in range(2)]
    with ThreadPoolExecutor(2) as threads:
        met, _ = threads.map(lambda me: me.begin({}), both)
        assert met is not None
        there = Met(met.number, met.members, reports, None)
        circles, failed = Circles((0, 0), shared), lambda: both[0].failed(there)
        making = threads.submit(circles.of, (0, 1), there, timedelta(seconds=60), failed)
        time.sleep(0.3)
        assert not making.done()
        both[1].leave()
        with pytest.raises(PeerFailed, match="has not made its groups"):
            making.result(LIMIT_S)
        assert not both[0].end(met, well=False)


def test_who_comes_when_the_job_has_ended_hears_of_it() -> None:
    shared = store()
    first, late = replica(shared, 0, among=2), replica(shared, 1, among=2)
    met = first.begin({})
    assert met is not None and met.members == (0,)
    first.conclude()
    assert late.begin({}) is None and late.over
    assert not first.over


def test_groups_do_not_pile_up() -> None:
    """Four members come and go: each lets go of the groups of those that are no more, and of what is idle."""
    shared = store()
    circles = {number: Circles((number, 0), shared) for number in range(4)}

    def meet(number: int, members: tuple[int, ...]) -> None:
        reports = {m: {"circles": circles[m].told, "cut": [[(0, 0, 4)]]} for m in members}
        met = Met(number, members, reports, None)

        def one(m: int) -> None:
            circles[m].only(met)
            circles[m].of(members, met, timedelta(seconds=LIMIT_S), lambda: False)

        with ThreadPoolExecutor(4) as threads:
            assert [*threads.map(one, members)] == [None] * len(members)

    subsets = [(0, 1), (0, 1, 2), (0, 1, 3), (0, 1, 2, 3), (0, 1)]
    for number, members in enumerate(subsets):
        meet(number, members)
    assert [*circles[0].told] == [*circles[1].told] == ["0-1"]
    meet(5, (0, 1, 2, 3))
    assert {len(one.told) for one in circles.values()} <= {2, 3}
    for number in range(6, 6 + IDLE + 2):
        meet(number, (0, 1, 2, 3))
    assert [[*one.told] for one in circles.values()] == [["0-1-2-3"]] * 4
