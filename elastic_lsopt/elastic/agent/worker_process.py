"""One worker as its node's agent sees it: started, heard, fenced, reaped."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from elastic_lsopt.elastic.worker.link import LINK, WORKER

Event = Callable[["WorkerProcess", dict[str, Any]], None]
LAST_WORDS_S = 1.0
"""How long what a dead worker has said is read: to its end, unless a process that it has left keeps that open."""


class WorkerProcess:
    """A running worker. `event(worker, line)` gets every line that it says, and `{"kind": "exited", "code": …}` at its
    end, from threads of this object; nothing after that. No other of its node has its `place` while it lives."""

    def __init__(
        self, name: str, place: int, command: Sequence[str], environment: Mapping[str, str], event: Event,
        log: Any = None,
    ) -> None:  # fmt: skip
        self.name, self.place = name, place
        self.ready = self.entered = self.finished = False
        self.last_beat = time.monotonic()
        self.told: dict[str, Any] = {}
        """What the last heartbeat told: step, samples, loss, seconds of a step."""
        self._ahead: deque[tuple[int, float]] = deque()
        """Generations that it was told of and has not reached, and since when."""
        self._killed = False
        self._event = event
        ours, theirs = socket.socketpair()
        os.set_inheritable(theirs.fileno(), True)
        self._socket, self._send_lock = ours, threading.Lock()
        self.process = subprocess.Popen(
            list(command), env={**environment, LINK: str(theirs.fileno()), WORKER: name}, pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            start_new_session=True,  # a terminal's Ctrl-C reaches the agent alone
        )  # fmt: skip
        theirs.close()
        self._listening = threading.Thread(target=self._listen, daemon=True, name=f"{name}-link")
        self._listening.start()
        threading.Thread(target=self._reap, daemon=True, name=f"{name}-reaper").start()

    @property
    def state(self) -> str:
        """What it is doing, in a word or two, as `elastic-lsopt status` says it."""
        if self._killed:
            return "ending"
        if self.finished:
            return "finished"
        if not self.ready:
            return "warming up"
        if not self.entered:
            return "waiting"
        return "forming" if self._behind() else "training"

    def tell(self, kind: str, **more: Any) -> None:
        """Send a line; nothing where the worker is dead (its end is reaped)."""
        if kind == "enter":
            self._ahead.append((more["number"], time.monotonic()))
        with self._send_lock, suppress(OSError):
            self._socket.sendall(json.dumps({"kind": kind, **more}).encode() + b"\n")

    def hung(self, timeout_s: float) -> str:
        """What is wrong with it for longer than that, "" for nothing: it does not heartbeat, or its main thread does
        not come to a generation that it was told of (it may wait for ever in code of the user's)."""
        now = time.monotonic()
        behind = self._behind()
        if self._killed:
            return ""
        if now - self.last_beat > timeout_s:
            return f"is silent for {now - self.last_beat:.1f} s"
        if behind and now - self._ahead[0][1] > timeout_s:
            return f"has not come to generation {self._ahead[0][0]} within {now - self._ahead[0][1]:.1f} s"
        return ""

    def _behind(self) -> bool:
        """Whether it was told of a generation that its main thread has not come to."""
        while self._ahead and self._ahead[0][0] <= self.told.get("generation", 0):
            self._ahead.popleft()
        return bool(self._ahead)

    def kill(self, *, wait: bool = False) -> None:
        """Fence it, and its own children; with `wait`, nothing of it runs when this returns."""
        self._killed = True
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        if wait:
            self.process.wait()

    def drain(self) -> None:
        """Ask it to leave after the step."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)

    def _listen(self) -> None:
        with suppress(OSError, ValueError):
            for line in self._socket.makefile("rb"):
                self.last_beat = time.monotonic()
                told = json.loads(line)
                if told["kind"] == "heartbeat":
                    self.told = told
                else:
                    self._event(self, told)

    def _reap(self) -> None:
        code = self.process.wait()
        self.kill()  # whatever it started
        self._listening.join(LAST_WORDS_S)  # one that has finished must not count as one that has left
        self._event(self, {"kind": "exited", "code": code})
