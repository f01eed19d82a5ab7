"""The store that an agent hosts, in bounded memory: made anew, on the same socket, when it holds too much.

A TCPStore takes whatever anyone sends and keeps it until it is asked to forget. Nothing in it is of lasting value: a
message may be lost with a store (mailbox.py), and a group that is being formed forms anew. So when this process has
grown by more than the members of the job can have brought about, the store is thrown away with all that is in it. The
listening socket stays this process's own all the while, so nobody else can take the address, and a member's next
connection waits in it.

What older generations have left is deleted as the job goes on: the addresses of a thousand ranks are 8 MB a group.
"""

from __future__ import annotations

import ctypes
import logging
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

log = logging.getLogger("elastic_lsopt")
T = TypeVar("T")
LIMIT_BYTES = 128 * 2**20
"""What the process may grow by, beside what groups of so many ranks need."""
RANK_BYTES, PAIR_BYTES = 500, 16
"""Of a gloo group's addresses in the store, per rank and per pair of ranks (154 and 8 measured, without keys)."""
GROUPS = 8
"""Of a generation: the default one, the engine's, the mirror's, the checkpoint's."""
LOOK_S = 0.05
WAIT = timedelta(hours=1)
_GENERATION = re.compile(r"/?generation/((\d+)(?:/replica/\d+)?)/")


class BoundedStore:
    """A TCPStore on `listener`, whose place another takes where it grows the process by more than `limit_bytes`.

    Memory beyond the limit: what the network brings in LOOK_S. All methods may be called from any thread.
    """

    def __init__(self, listener: socket.socket, host: str, limit_bytes: int = LIMIT_BYTES) -> None:
        self._listener, self._host, self._limit = listener, host, limit_bytes
        self._lock = threading.Lock()
        self._room = 0
        self._oldest = self._forgotten = 0
        self._kept: frozenset[str] = frozenset()
        self._closed = threading.Event()
        self.made_anew = 0
        """How often a store was thrown away."""
        self._store: dist.TCPStore | None = self._made()
        threading.Thread(target=self._watch, daemon=True, name="store").start()

    def expect(self, generation: int, ranks: int, groups: Collection[str] = ()) -> None:
        """A generation of so many ranks forms here: room for its groups; the generations before the last may go, but
        for these groups (GENERATION/replica/NUMBER), which live on."""
        self._room = 2 * GROUPS * ranks * (RANK_BYTES + ranks * PAIR_BYTES)  # the last one's may still be there
        self._kept, self._oldest = frozenset(groups), generation - 1

    def set(self, key: str, value: bytes) -> None:
        self._use(lambda store: store.set(key, value))  # type: ignore[arg-type]

    def queue_len(self, key: str) -> int:
        return self._use(lambda store: store.queue_len(key))

    def queue_push(self, key: str, value: bytes) -> None:
        self._use(lambda store: store.queue_push(key, value))

    def _use(self, act: Callable[[dist.TCPStore], T]) -> T:
        """`act` of the present store, which is not thrown away meanwhile."""
        with self._lock:
            assert self._store is not None
            return act(self._store)

    def close(self) -> None:
        """Stop watching; the store lives as long as the process."""
        self._closed.set()

    def _made(self) -> dist.TCPStore:
        return dist.TCPStore(
            self._host, self._listener.getsockname()[1], is_master=True, wait_for_workers=False,
            master_listen_fd=os.dup(self._listener.fileno()), use_libuv=True, timeout=WAIT,
        )  # fmt: skip

    def _watch(self) -> None:
        before = resident_bytes()
        while not self._closed.wait(LOOK_S):
            if self._forgotten < self._oldest:
                self._forgotten = self._oldest
                self._forget(self._oldest)
            if resident_bytes() - before <= self._limit + self._room:
                continue
            with self._lock:
                self._store = None  # its thread ends, and its memory goes
                ctypes.CDLL(None).malloc_trim(0)
                before = resident_bytes()  # of no store: what the next one is sent meanwhile would count as ours
                self._store = self._made()
            self.made_anew += 1
            if self.made_anew == 1:  # a stranger does not fill the log either
                log.warning(
                    "the store at %s:%d held more than the job's members put there (%d MiB), and was made anew; "
                    "somebody else writes to it: see docs/security.md.",
                    self._host, self._listener.getsockname()[1], (self._limit + self._room) // 2**20,
                )  # fmt: skip

    def _forget(self, oldest: int) -> None:
        with suppress(RuntimeError):
            for key in self._use(lambda store: store.list_keys()):
                if (found := _GENERATION.match(key)) and int(found[2]) < oldest and found[1] not in self._kept:
                    self._use(lambda store, key=key: store.delete_key(key))
                    time.sleep(0)  # an agent's own words come between


def resident_bytes() -> int:
    """Of this process, as the kernel counts."""
    with open("/proc/self/statm", encoding="ascii") as numbers:
        return int(numbers.read().split()[1]) * os.sysconf("SC_PAGESIZE")
