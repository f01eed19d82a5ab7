"""Messages between agents over TCPStores: every agent hosts one, bound to its own address.

    host's store     queue "in"         the others' records, for the host
                     queue "to/<name>"  the host's answers, which <name> waits for there

An agent opens a connection to another only to speak first (to the host, to a candidate); answers lie in the other's
own store, so the host of a thousand nodes opens none. A message is at most sent: it may be lost with a store, come
twice or late; whoever reads it (`membership`) takes it as news of a state, not as a command.

[Note: threads of the mailbox] Each of these may wait for seconds in a dead network and is left alone then (daemons):
one thread reads this agent's own queue and one writes its answers there; per outgoing connection one thread writes (the
newest message only: an older one that was not sent yet is out of date) and one waits for answers. The threads that
write also seal the letters, so the agent's main thread does not. They share nothing but `_Line.next`, under its
lock, and the time since when a line is quiet, and give what they hear to `heard`, which must be safe to call from any
thread.

[Note: a quiet line] A network that loses packets closes no connection: what was written waits in the kernel, which
tries again after ever longer pauses, twice as long as the network was broken. So a line on which messages go out and
nothing has come back for `silence_s` is cut and made anew; a new connection tries at once.
"""

from __future__ import annotations

import ctypes
import os
import queue
import socket
import threading
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from datetime import timedelta
from math import inf
from pathlib import Path

import torch
import torch.distributed as dist

from elastic_lsopt.elastic.mail.bounded_store import BoundedStore
from elastic_lsopt.elastic.mail.letter import Letter
from elastic_lsopt.errors import UserError

HERE = "127.0.0.1"
CONNECT_S = 2.0
ANSWER_S = 4.0
"""How long a listener may take to answer as a store."""
WAIT = timedelta(hours=1)
"""How long a reader waits for a message. One that gives up loses the message that comes then, so it hardly does."""
RETRY_S = 0.2
UNREAD = 64
"""Answers that wait for one agent, at most; where there are more, it has gone."""
MANY, REST_S = 100, 0.01
"""Who serves more others than this looks for work every REST_S only, and ticks twice per heartbeat: to be woken for
each costs more than the work."""
LONGEST_BYTES = 4 * 2**20
"""A longer message is not read: a stranger must not fill this agent's memory with one."""
Heard = Callable[[bytes], None]
Message = Letter | bytes
"""A letter is sealed by the thread that writes it."""


def silence_torch() -> None:
    """Keep torch's C++ log of lost connections, a page each, out of this process: they are an agent's daily life.

    (TORCH_CPP_LOG_LEVEL is read once, when torch is imported.)
    """
    library = Path(torch.__file__).parent / "lib" / "libc10.so"
    with suppress(OSError, ValueError):
        ctypes.c_int.in_dll(ctypes.CDLL(str(library)), "FLAGS_caffe2_log_level").value = 3


def split_address(address: str) -> tuple[str, int]:
    """host, port of "host:port". Raises UserError for anything else."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 <= int(port) < 65536:
        raise UserError(f"the address {address!r} must read host:port, with a port in 0..65535.")
    return host, int(port)


def listen(address: str) -> tuple[socket.socket, str]:
    """A socket that listens on this address alone (port 0: any free one), and the address that it has.

    Raises UserError where the address is taken or not this machine's. (TCPStore by itself listens on all interfaces.)
    """
    host, port = split_address(address)
    try:
        listener = socket.create_server((host, port))
    except OSError as error:
        raise UserError(
            f"elastic.address={address}: cannot listen there: {error.strerror}; the port may be taken, or the host "
            "name is not of this machine."
        ) from None
    return listener, f"{host}:{listener.getsockname()[1]}"


def host_store(address: str) -> tuple[dist.TCPStore, str]:
    """A TCPStore that listens on this address alone, and the address that it has. Raises UserError as `listen`."""
    listener, address = listen(address)
    host, port = split_address(address)
    store = dist.TCPStore(
        host, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach(), use_libuv=True,
        timeout=WAIT,
    )  # fmt: skip
    return store, address


def reachable(address: str, timeout_s: float = CONNECT_S) -> bool:
    """Whether somebody listens there."""
    try:
        socket.create_connection(split_address(address), timeout=timeout_s).close()
    except OSError:
        return False
    return True


def connect(address: str, timeout: timedelta = WAIT) -> dist.TCPStore:
    """A client of the store at `address`. Raises OSError or RuntimeError where none answers within ANSWER_S.

    torch gives a store's greeting no limit: whoever listens there and says nothing, a stopped agent or a stranger,
    would be waited for without end. After ANSWER_S this process's connections to that address are cut.
    """
    host, port = split_address(address)
    socket.create_connection((host, port), timeout=CONNECT_S).close()  # a refusal at once and without torch's long log
    limit = threading.Timer(ANSWER_S, cut_off, [address])
    limit.daemon = True
    limit.start()
    try:
        store = dist.TCPStore(
            host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=CONNECT_S), use_libuv=True
        )
    finally:
        limit.cancel()
    store.set_timeout(timeout)
    return store


def cut_off(address: str) -> None:
    """Shut down this process's connections to `address`, from any thread: whoever waits on one gets an error."""
    host, port = split_address(address)
    with suppress(OSError):  # a name that is not known any more
        theirs = {str(info[4][0]) for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
        for fd in os.listdir("/proc/self/fd"):
            with suppress(OSError):  # its owner may have closed it meanwhile
                if os.readlink(f"/proc/self/fd/{fd}").startswith("socket:"):
                    _shut_down_if(int(fd), theirs, port)


def _shut_down_if(fd: int, hosts: Collection[str], port: int) -> None:
    with socket.socket(fileno=os.dup(fd)) as copy:
        peer = copy.getpeername() if copy.family in (socket.AF_INET, socket.AF_INET6) else ("", 0)
        if peer[0].removeprefix("::ffff:") in hosts and peer[1] == port:
            copy.shutdown(socket.SHUT_RDWR)


def _sealed(message: Message) -> bytes:
    return message if isinstance(message, bytes) else message.sealed


class _Line:
    """A connection to another agent's store. See [Note: threads of the mailbox] and [Note: a quiet line]."""

    def __init__(self, me: str, address: str, heard: Heard, failed: Callable[[], None], silence_s: float) -> None:
        self.address, self._me, self._heard, self._failed = address, me, heard, failed
        self._silence_s, self._quiet_since = silence_s, inf
        self._due = threading.Condition()
        self._next: Message | None = None
        self._closed = False
        threading.Thread(target=self._write, daemon=True, name=f"to-{address}").start()

    def send(self, letter: Message) -> None:
        with self._due:
            self._next = letter
            self._due.notify()

    def close(self) -> None:
        with self._due:
            self._closed = True
            self._due.notify()

    def _write(self) -> None:
        store: dist.TCPStore | None = None
        while True:
            with self._due:
                self._due.wait_for(lambda: self._next is not None or self._closed)
                if self._closed:
                    return
                letter, self._next = self._next, None
            assert letter is not None
            now = time.monotonic()
            if store is not None and now - self._quiet_since > self._silence_s:
                cut_off(self.address)
                store = None
            try:
                if store is None:
                    store = connect(self.address)
                    answers = connect(self.address)
                    self._quiet_since = inf
                    threading.Thread(target=self._read, args=(answers,), daemon=True).start()
                self._quiet_since = min(self._quiet_since, now)
                store.queue_push("in", _sealed(letter))
            except ConnectionRefusedError:
                store = None
                self._failed()
                time.sleep(RETRY_S)
            except (RuntimeError, OSError):
                if store is None:
                    time.sleep(RETRY_S)
                    continue
                store = None  # the connection was lost: find out at once whether its other end is gone
                with self._due:
                    self._next = self._next or letter

    def _read(self, store: dist.TCPStore) -> None:
        with suppress(RuntimeError, OSError):  # the writer notices it as well, and connects anew
            while not self._closed:
                message = store.queue_pop(f"to/{self._me}")
                self._quiet_since = inf
                self._heard(message)


class Mailbox:
    """This agent's store, its connections to others, and what comes in.

    `heard(message)` gets every message as it is; `unreachable(address)` is told of a refused connection, whose other
    end is gone (one that gets no answer may be only cut off, and is tried on). Both are called from any thread. A
    connection is made anew after `silence_s` without an answer.
    """

    def __init__(
        self, name: str, address: str, heard: Heard, unreachable: Callable[[str], None], *, silence_s: float
    ) -> None:
        self.name, self._heard, self._unreachable, self._silence_s = name, heard, unreachable, silence_s
        listener, self.address = listen(address)
        self.store = BoundedStore(listener, split_address(address)[0])
        self._lines: dict[str, _Line] = {}
        self._closed = False
        self._answers: queue.SimpleQueue[tuple[str, Message] | None] = queue.SimpleQueue()
        self._room: dict[str, int] = {}
        """How many answers each agent may still be given before the length of its queue is looked at again."""
        threading.Thread(target=self._read, daemon=True, name="in").start()
        threading.Thread(target=self._answer, daemon=True, name="answers").start()

    def send(self, address: str, letter: Message) -> None:
        """Speak first: into the store at `address`, and listen there for answers to this agent's name."""
        line = self._lines.get(address)
        if line is None:
            line = self._lines[address] = _Line(
                self.name, address, self._hear, lambda: self._unreachable(address), self._silence_s
            )
        line.send(letter)

    def answer(self, name: str, letter: Message) -> None:
        """To agent `name`, which listens at this store; returns at once."""
        self._answers.put((name, letter))

    def drop(self, address: str) -> None:
        """Close the connection to `address`, if there is one."""
        if line := self._lines.pop(address, None):
            line.close()

    def close(self) -> None:
        self._closed = True
        self._answers.put(None)
        self.store.close()
        for line in self._lines.values():
            line.close()

    def _answer(self) -> None:
        while (due := self._answers.get()) is not None:
            if self._answers.empty() and len(self._room) > MANY:
                time.sleep(REST_S)
            name, letter = due
            key, room = f"to/{name}", self._room.get(name, 0)
            with suppress(RuntimeError):  # the mailbox is being closed
                if room <= 0:
                    room = UNREAD - self.store.queue_len(key)
                if room > 0:
                    self.store.queue_push(key, _sealed(letter))
                self._room[name] = room - 1

    def _read(self) -> None:
        own = connect(self.address)
        while not self._closed:
            try:
                self._hear(own.queue_pop("in"))
            except RuntimeError:
                own = connect(self.address)

    def _hear(self, message: bytes) -> None:
        if not self._closed and len(message) <= LONGEST_BYTES:
            self._heard(message)
