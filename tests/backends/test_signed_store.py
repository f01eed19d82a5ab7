"""Groups that form over a store which a stranger can reach: he is not believed, and takes nobody's place."""

from __future__ import annotations

import hashlib
import hmac
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from elastic_lsopt.backends.fabric.signed_store import SignedStore, derived, server_of
from elastic_lsopt.elastic.mail.mailbox import connect, host_store
from elastic_lsopt.elastic.worker import manifest
from elastic_lsopt.elastic.worker.meeting import meet
from elastic_lsopt.errors import PeerFailed

SECRET = b"sixteen bytes ok"
TIMEOUT = timedelta(seconds=5)
T = Any


@pytest.fixture
def address() -> Iterator[str]:
    """Of a store as an agent hosts it, which anyone can reach."""
    store, address = host_store("127.0.0.1:0")
    yield address
    del store


def on_ranks(size: int, act: Callable[[int], T]) -> list[T]:
    """`act(rank)` on a thread per rank; an exception in the place of a result."""

    def one(rank: int) -> T:
        try:
            return act(rank)
        except Exception as error:
            return error

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(one, range(size)))


def test_a_signature_is_hmac_sha256_of_key_and_value() -> None:
    plain = dist.HashStore()
    SignedStore(plain, SECRET).set("a", "value")
    told = b"".join(len(part).to_bytes(8, "big") + part for part in (b"a", b"value"))
    assert plain.get("a") == hmac.new(SECRET, told, hashlib.sha256).digest() + b"value"


def test_it_works_as_any_store() -> None:
    store = SignedStore(dist.HashStore(), SECRET)
    store.set("a", b"\0\1")
    assert store.get("a") == b"\0\1" and store.check(["a"]) and not store.check(["b"])
    assert [store.add("n", 2), store.add("n", -1), store.add("n", 0)] == [2, 1, 1]
    assert [store.compare_set("c", "", "x"), store.compare_set("c", "y", "z")] == [b"x", b"x"]
    assert store.compare_set("c", "x", "z") == b"z" == store.get("c")
    assert store.delete_key("a") and not store.check(["a"])


def test_what_a_stranger_writes_is_refused() -> None:
    plain = dist.HashStore()
    store, other = SignedStore(plain, SECRET), SignedStore(plain, b"another secret..")
    store.set("a", "1")
    for forged in (b"1", b"", plain.get("a")[:-1] + b"2", plain.get("a")):  # the last: a value of another key
        plain.set("b", forged)  # type: ignore[arg-type]
        with pytest.raises(PeerFailed, match="the store's value of b is not signed with this job's secret"):
            store.get("b")
    for read in (lambda: other.get("a"), lambda: other.add("a", 1), lambda: other.compare_set("a", "", "2")):
        with pytest.raises(PeerFailed):
            read()


def test_a_group_forms_over_it(address: str) -> None:
    def rank(own: int) -> tuple[float, bool]:
        store = meet(dist.PrefixStore("generation/1", connect(address, TIMEOUT)), own, 3, SECRET)
        group = dist.ProcessGroupGloo(dist.PrefixStore("default", store), own, 3, TIMEOUT)
        value = torch.tensor([float(own + 1)])
        group.allreduce([value]).wait()
        return value.item(), isinstance(server_of(dist.PrefixStore("a", store)), dist.TCPStore)

    assert on_ranks(3, rank) == [(6.0, True)] * 3


def test_a_stranger_takes_no_ranks_place_in_gloo(address: str) -> None:
    """He answers for rank 1, as a process without the secret once did: rank 0 does not connect to what he says."""

    def rank(own: int) -> Any:
        raw = dist.PrefixStore("generation/1", connect(address, TIMEOUT))
        store = meet(raw, own, 2, SECRET)
        if own == 1:  # dies here; the stranger goes on in its place, over the store alone
            return dist.ProcessGroupGloo(dist.PrefixStore("default", raw), 1, 2, TIMEOUT)
        return dist.ProcessGroupGloo(dist.PrefixStore("default", store), 0, 2, TIMEOUT)

    member, _ = on_ranks(2, rank)
    assert isinstance(member, PeerFailed) and "is not signed with this job's secret" in str(member)


def test_nobody_without_the_secret_meets(address: str) -> None:
    raw = dist.PrefixStore("generation/1", connect(address, TIMEOUT))
    raw.set("met/1", "00" * 16)
    with pytest.raises(PeerFailed, match="met/1 is not signed"):
        meet(raw, 0, 2, SECRET)


def test_an_older_group_with_the_same_secret_cannot_be_played_back() -> None:
    """Everything that an older group of the same generation has signed stands in the new store."""
    older = dist.HashStore()
    first = on_ranks(2, lambda own: meet(older, own, 2, SECRET))
    first[0].set("0//cpu//0/1", "an address of the older group")

    replayed = dist.HashStore()
    for key in ("session", "met/1", "0//cpu//0/1"):
        replayed.set(key, older.get(key))  # type: ignore[arg-type]
    with pytest.raises(PeerFailed, match="session is of another group"):
        meet(replayed, 1, 2, SECRET)
    leader = meet(replayed, 0, 2, SECRET)  # believes the recorded challenge, which is signed …
    with pytest.raises(PeerFailed, match="not signed"):  # … but no value that was signed with the older group's key
        leader.get("0//cpu//0/1")


def test_whoever_waits_for_others_can_be_called_off() -> None:
    called = threading.Event()

    def look_up() -> None:
        if called.is_set():
            raise InterruptedError

    threading.Timer(0.1, called.set).start()
    with pytest.raises(InterruptedError):
        meet(dist.HashStore(), 0, 2, SECRET, look_up=look_up)


def test_a_stranger_does_not_open_the_fence_of_commits(address: str) -> None:
    """A claim of generation 7 keeps 6 out; a stranger's word in its place lets nobody in."""
    assert manifest.claim(address, SECRET, 7, 20) and not manifest.claim(address, SECRET, 6, 20)
    connect(address, TIMEOUT).set("manifest/20", "1")
    assert not manifest.claim(address, SECRET, 6, 20)
    assert manifest.claim(address, SECRET, 6, 30)


def test_keys_of_different_purposes_and_borders_differ() -> None:
    assert (
        len({derived(SECRET, "a", "b"), derived(SECRET, "ab"), derived(SECRET, "", "ab"), derived(SECRET, "b", "a")})
        == 4
    )
