"""What replicas conclude from each other's words: who founds the job, who is a newcomer, who must be waited for."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch.distributed as dist

from elastic_lsopt.elastic.membership.placement import Replica
from elastic_lsopt.elastic.worker.link import NOWHERE, Entered, WorkerLink
from elastic_lsopt.elastic.worker.roll import Roll
from elastic_lsopt.errors import UserError

pytestmark = pytest.mark.fast


def entered(*since: int, replica: int = 0, number: int = 9, **more: Any) -> Entered:
    """A generation of replicas of one worker, formed in these generations; 0: vacant."""
    replicas = tuple(Replica((f"w{k}",) if at else (), at) for k, at in enumerate(since))
    names = tuple(w for r in replicas for w in r.workers)
    values = {"store": "", "secret": "", "gone": (), "why": "", "running": True, "node": "n"}
    return Entered(number, names, ("n",) * len(names), replicas=replicas, replica=replica, **values | more)


def roll(store: dist.Store, own: int) -> Roll:
    """As if the host's store were this one."""
    made = object.__new__(Roll)
    made._own, made._said, made._store_since = own, {}, 0
    made._store = store  # type: ignore[assignment]
    return made


def newcomers(store: dist.Store, since: list[int], states: list[bool]) -> dict[int, bool]:
    """All replicas form at once, each in its own time; what those conclude that hold no state."""
    concluded: dict[int, bool] = {}

    def form(k: int) -> None:
        time.sleep(0.02 * ((k * 2 + since[0]) % 3))
        own = roll(store, k)
        own.found(since[k], held=states[k], job="")
        if not states[k]:
            concluded[k] = own.is_newcomer(since[k], lambda: entered(*since))
        own.began(since[k])

    threads = [threading.Thread(target=form, args=(k,)) for k in range(len(since)) if since[k]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive(), "they wait for each other for ever"
    return concluded


@pytest.mark.parametrize(
    ("since", "states", "concluded"),
    [
        ([1, 1, 1], [False, False, False], {0: False, 1: False, 2: False}),  # all found the job, whoever is first
        ([1, 0, 0], [False, False, False], {0: False}),
        ([3, 7], [True, False], {1: True}),
        ([8, 7, 7], [False, True, False], {0: True, 2: True}),
        ([8, 8], [False, False], {0: False, 1: False}),  # all have lost their state at once: from the checkpoints
    ],
)
def test_who_founds_and_who_joins(since: list[int], states: list[bool], concluded: dict[int, bool]) -> None:
    for _ in range(3):
        assert newcomers(dist.HashStore(), since, states) == concluded


def test_who_was_there_before_counts_though_it_found_nothing() -> None:
    store = dist.HashStore()
    first, second = roll(store, 0), roll(store, 1)
    first.found(1, held=False, job="")
    assert not first.is_newcomer(1, lambda: entered(1, 0))
    first.began(1)
    second.found(2, held=False, job="")
    assert second.is_newcomer(2, lambda: entered(1, 2))
    third = roll(store, 0)  # replica 0 was lost, and formed anew: what it said before counts no more
    third.found(5, held=False, job="")
    second.found(5, held=False, job="")
    assert not second.is_newcomer(5, lambda: entered(5, 5))


def test_nobody_waits_for_a_replica_that_is_gone() -> None:
    store = dist.HashStore()
    own = roll(store, 0)
    own.found(4, held=False, job="")
    told = iter([entered(4, 4), entered(4, 4), entered(4, 0)])
    assert not own.is_newcomer(4, lambda: next(told))


def test_all_have_the_id_of_the_first_and_a_new_store_hears_everything_again() -> None:
    store = dist.HashStore()
    first, second = roll(store, 0), roll(store, 1)
    first.found(1, held=True, job="x")
    assert second.job("y") == first.job("z") == "x"
    first.began(1)
    other = dist.HashStore()
    first._connect = lambda entered: setattr(first, "_store", other)  # type: ignore[method-assign]
    assert first.follow(entered(1, 1, store_since=5))
    again = roll(other, 1)
    assert again.job("y") == "x" and again.unfinished(entered(1, 1, replica=1)) == [0]
    first.finish()
    assert again.unfinished(entered(1, 1, replica=1)) == []


def test_who_is_waited_for_at_the_end() -> None:
    store = dist.HashStore()
    own, other = roll(store, 0), roll(store, 1)
    assert own.unfinished(entered(1, 2)) == [1], "it has not said anything yet: it is on its way"
    other.found(2, held=False, job="")
    assert own.unfinished(entered(1, 2)) == [], "a newcomer has nothing that the job would miss"
    other.began(2)
    assert own.unfinished(entered(1, 2)) == [1]
    assert own.unfinished(entered(1, 3)) == [1], "it forms anew"
    assert own.unfinished(entered(1, 0)) == []
    other.finish()
    assert own.unfinished(entered(1, 2)) == []


def test_other_data_is_refused() -> None:
    store = dist.HashStore()
    roll(store, 0).refuse_other_data({"samples": 5, "digest of samples": None})
    roll(store, 2).refuse_other_data({"samples": 5, "digest of samples": "d"})
    with pytest.raises(UserError, match=r"training data of replica 1 is not that of the job's others \(samples: 6"):
        roll(store, 1).refuse_other_data({"samples": 6, "digest of samples": "d"})


def test_a_group_is_named_by_its_replica_and_the_generation_that_formed_it() -> None:
    present = entered(3, 7, replica=1)
    assert (present.epoch, present.together, present.sizes, present.living) == ((1, 7), ("w1",), (1, 1), (0, 1))
    assert entered(3, 0, replica=NOWHERE).epoch == (NOWHERE, 9)
    alone = Entered(9, ("a", "b"), ("m", "n"), "", "", (), "", running=True, node="n")
    assert (alone.epoch, alone.together, alone.together_on) == ((0, 9), ("a", "b"), ("m", "n"))


def test_what_changes_nothing_for_a_worker_is_followed_though_it_waits_elsewhere() -> None:
    link = object.__new__(WorkerLink)
    link.generation, link.epoch, link._newest = 3, (1, 3), entered(3, 3, replica=1, number=3)
    assert link.followed == 3
    link._newest = entered(5, 3, replica=1, number=5)
    assert link.followed == 5, "another replica's change"
    link._newest = entered(5, 6, replica=1, number=6)
    assert link.followed == 3, "its own"
    link.generation, link._newest = 2**53, entered(5, 3, replica=1, number=5)
    assert link.followed == 2**53, "at the end nothing matters any more"
