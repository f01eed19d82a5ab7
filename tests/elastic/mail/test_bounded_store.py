"""A stranger who writes into an agent's store does not fill its memory, and the members find it again."""

from __future__ import annotations

import ctypes
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress

import pytest

from elastic_lsopt.elastic.mail import bounded_store
from elastic_lsopt.elastic.mail.bounded_store import BoundedStore, resident_bytes
from elastic_lsopt.elastic.mail.mailbox import Mailbox, connect, listen
from tests.processes.ranks import rank_environment
from tests.processes.warm import Popen

MIB = 2**20


@pytest.fixture
def bounded() -> Iterator[tuple[BoundedStore, str]]:
    listener, address = listen("127.0.0.1:0")
    store = BoundedStore(listener, "127.0.0.1", limit_bytes=32 * MIB)
    yield store, address
    store.close()


def give_back() -> None:
    """What the C library keeps of freed memory: in a process that has freed large blocks before, up to 64 MiB."""
    with suppress(AttributeError):  # another C library than glibc
        ctypes.CDLL(None).malloc_trim(0)


STRANGER = """
import sys
from elastic_lsopt.elastic.mail.mailbox import connect
address, how = sys.argv[1:]
value, sent, client = bytes(4 * 2**20), 0, connect(address)
for line in sys.stdin:
    end = sent + int(line) * 2**20
    while sent < end:
        try:
            client.set(f"k{sent}", value) if how == "values" else client.queue_push("q", value)
            sent += len(value)
        except RuntimeError:
            client = connect(address)
    print("sent", flush=True)
"""
"""Sends so many MiB for each line."""


@pytest.mark.parametrize("how", ["values", "queue"])
def test_what_a_stranger_sends_is_not_kept(
    bounded: tuple[BoundedStore, str], how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It sends no more than 16 MiB between two looks, however fast the network is and however busy the machine."""
    store, address = bounded
    before, most, looks = resident_bytes(), 0, list[int]()

    def look() -> int:
        looks.append(found := resident_bytes())
        return found

    monkeypatch.setattr(bounded_store, "LOOK_S", 0.01)
    monkeypatch.setattr(bounded_store, "resident_bytes", look)
    with Popen(
        [sys.executable, "-c", STRANGER, address, how], env=rank_environment(), text=True, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as stranger:  # fmt: skip
        assert stranger.stdin is not None and stranger.stdout is not None
        for _ in range(16):
            print(16, file=stranger.stdin, flush=True)
            assert stranger.stdout.readline() == "sent\n"
            most, known, end = max(most, resident_bytes() - before), len(looks), time.monotonic() + 20
            while len(looks) < known + 2:  # the first may have begun before all was there
                assert time.monotonic() < end, "nobody looks"
                time.sleep(0.005)
    assert stranger.returncode == 0 and store.made_anew >= 1
    end = time.monotonic() + 20  # the newest store may hold too much until it is looked at
    while resident_bytes() - before >= 64 * MIB and time.monotonic() < end:
        give_back()
        time.sleep(0.05)
    print(f"{store.made_anew} stores; at most {most / MIB:.0f} MiB, {(resident_bytes() - before) / MIB:.0f} in the end")
    assert resident_bytes() - before < 64 * MIB, "what the stranger sent is still there"
    assert most < 128 * MIB, f"grew by {most / MIB:.0f} of 256 MiB"


def test_agents_go_on_talking_when_a_store_was_made_anew() -> None:
    heard: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    boxes = [Mailbox(name, "127.0.0.1:0", heard.put, lambda address: None, silence_s=2.0) for name in ("a", "b")]
    first, second = boxes
    second.send(first.address, b"before")
    assert heard.get(timeout=10) == b"before"
    second_hears = threading.Timer(0.2, lambda: first.answer("b", b"answer"))
    second_hears.start()
    assert heard.get(timeout=10) == b"answer"

    first.store._limit = -(2**50)  # whatever it holds is too much, once
    while not first.store.made_anew:
        time.sleep(0.01)
    first.store._limit = 2**50
    end, found = time.monotonic() + 10, b""
    while found != b"after" and time.monotonic() < end:
        second.send(first.address, b"after")
        with suppress(queue.Empty):
            found = heard.get(timeout=0.5)
    assert found == b"after"
    while found != b"again" and time.monotonic() < end:
        first.answer("b", b"again")
        with suppress(queue.Empty):
            found = heard.get(timeout=0.5)
    assert found == b"again"
    for box in boxes:
        box.close()


def test_older_generations_are_forgotten(bounded: tuple[BoundedStore, str]) -> None:
    store, address = bounded
    client = connect(address)
    for key in ("generation/3/a", "generation/4/a", "generation/5/a", "manifest/3", "status"):
        client.set(key, "x")
    store.expect(5, ranks=2)
    end = time.monotonic() + 5
    while client.check(["generation/3/a"]) and time.monotonic() < end:
        time.sleep(0.02)
    assert sorted(key.strip("/") for key in client.list_keys()) == [
        "generation/4/a", "generation/5/a", "manifest/3", "status",
    ]  # fmt: skip


def test_groups_that_live_on_are_not_forgotten(bounded: tuple[BoundedStore, str]) -> None:
    """In a job of several replicas: one of which may be of generation 2 while others have changed three times."""
    store, address = bounded
    client = connect(address)
    keys = ("generation/2/replica/0/a", "generation/2/replica/1/a", "generation/3/replica/1/a", "roll/1/job")
    for key in keys:
        client.set(key, "x")
    store.expect(5, ranks=2, groups=["2/replica/0", "5/replica/1"])
    end = time.monotonic() + 5
    gone = ("generation/2/replica/1/a", "generation/3/replica/1/a")
    while any(client.check([key]) for key in gone) and time.monotonic() < end:
        time.sleep(0.02)
    assert sorted(key.strip("/") for key in client.list_keys()) == [keys[0], keys[3]]
