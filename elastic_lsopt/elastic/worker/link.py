"""The line between a node's agent and one of its workers: a socket pair with a JSON object a line.

    worker to agent    ready, heartbeat, broken, drain, may_commit, finished, failed
    agent to worker    enter (a new generation), stop, granted

[Note: threads of the link] The worker's main thread may sit in a collective that never ends, or compute for seconds. So
one thread reads what the agent says, and cuts the transport where the main thread cannot go on in its generation. One
heartbeats, by which the agent tells a stopped or dead process from a slow one, and says which generation the main
thread is in, by which the agent knows a main thread that hangs. Both touch only what the lock guards. The end of the
line means that the agent is dead, and then so is this worker, at once: another agent may already have given its place
away.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from elastic_lsopt.elastic.membership.placement import Replica

LINK = "ELASTIC_LSOPT_LINK"
"""Names the file descriptor of the worker's end."""
WORKER = "ELASTIC_LSOPT_WORKER"
"""Names the worker."""
AGENT_DIED = 113
"""Exit code of a worker whose agent has gone."""
_PR_SET_PDEATHSIG = 1
NOWHERE = -1
"""The replica of a worker that is in no generation."""


@dataclass(frozen=True)
class Entered:
    """A committed generation, as one worker is told of it."""

    number: int
    workers: tuple[str, ...]
    """All workers, by rank."""
    nodes: tuple[str, ...]
    """The node of each rank."""
    store: str
    """Address of the store of this generation."""
    secret: str = field(repr=False)
    """Of this generation's workers alone, in hexadecimal: what they sign in that store."""
    gone: tuple[str, ...]
    """Workers of the generation before that died: nobody must wait for them."""
    why: str
    running: bool
    """False while there are too few nodes to train."""
    node: str
    """This worker's own node."""
    replicas: tuple[Replica, ...] = ()
    """Of a job of several: the workers of each. The secret is of this worker's own replica then."""
    replica: int = 0
    """This worker's own; NOWHERE where it has none."""
    store_since: int = 0
    """The generation from which on replicas have met in the same store, so that another one is told from it."""
    meetings: str = field(default="", repr=False)
    """Of all workers, as long as the store is the same, in hexadecimal: what they sign where replicas meet."""
    place: int = 0
    """Of this process among those of its node, for as long as it lives."""

    @classmethod
    def from_json(cls, told: dict[str, Any]) -> Entered:
        values: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in told.items() if k in cls.__annotations__
        }
        replicas = tuple(Replica(tuple(r["workers"]), r["since"]) for r in values.pop("replicas", ()))
        return cls(**values, replicas=replicas)

    @property
    def apart(self) -> bool:
        """Whether the job has several replicas."""
        return bool(self.replicas)

    @property
    def epoch(self) -> tuple[int, int]:
        """What names the group that this worker is in: its replica, and the generation that formed it."""
        if not self.apart or self.replica == NOWHERE:
            return self.replica, self.number
        return self.replica, self.replicas[self.replica].since

    @property
    def together(self) -> tuple[str, ...]:
        """The workers that form a group with this one, by rank."""
        return self.of_replica(self.replica)

    def of_replica(self, replica: int) -> tuple[str, ...]:
        """The workers of that replica, by rank; all of them in a job of one."""
        if not self.apart:
            return self.workers
        return () if replica == NOWHERE else self.replicas[replica].workers

    @property
    def together_on(self) -> tuple[str, ...]:
        """The nodes of those."""
        node_of = dict(zip(self.workers, self.nodes, strict=True))
        return tuple(node_of[worker] for worker in self.together)

    def unlike(self, present: Entered, replica: int) -> bool:
        """Whether that replica has other members in `present`, or none."""
        return self.replicas[replica] != present.replicas[replica]

    @property
    def living(self) -> tuple[int, ...]:
        """The replicas that have workers, in a job of several."""
        return tuple(k for k, size in enumerate(self.sizes) if size)

    @property
    def sizes(self) -> tuple[int, ...]:
        """How many workers each replica has, in a job of several."""
        return tuple(len(r.workers) for r in self.replicas)


def is_worker() -> bool:
    """Whether an agent has started this process."""
    return LINK in os.environ


class WorkerLink:
    """The worker's end. `comes(entered)` is called by the reading thread for each generation, before the main thread
    can know of it: it may end the present one by force; see [Note: threads of the link]."""

    def __init__(self, heartbeat_s: float) -> None:
        # Also where the reading thread cannot run: the kernel ends this worker with its agent.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        self._socket = socket.socket(fileno=int(os.environ[LINK]))
        self._lock = threading.Condition()
        self._newest: Entered | None = None
        self._told: list[Entered] = []
        self._granted: dict[int, bool] = {}
        self.name = os.environ[WORKER]
        self.stop_requested = False
        self.generation = 0
        """The newest that the main thread has noticed; the agent ends a worker that does not follow."""
        self.epoch: tuple[int, int] | None = None
        """The group that the main thread is in. Of a generation that leaves it as it is there is nothing to notice."""
        self._drain_requested = self._drain_told = False
        self.comes: Callable[[Entered], None] = lambda entered: None
        self._progress: dict[str, Any] = {}
        self._send_lock = threading.Lock()
        threading.Thread(target=self._read, daemon=True, name="link").start()
        threading.Thread(target=self._heartbeat, args=(heartbeat_s,), daemon=True, name="heartbeat").start()

    @property
    def newest(self) -> int:
        """The number of the newest generation that the agent has told of, 0 for none."""
        return self._newest.number if self._newest else 0

    @property
    def present(self) -> Entered:
        """The newest generation itself, of those that the agent has told of."""
        assert self._newest is not None
        return self._newest

    @property
    def followed(self) -> int:
        """The newest generation of which this worker has made what there is to be made."""
        newest = self._newest
        return max(self.generation, newest.number) if newest and newest.epoch == self.epoch else self.generation

    def next_generation(self, after: int, timeout_s: float | None = None) -> Entered | None:
        """Wait for a generation newer than `after`; the newest one, None after `timeout_s`."""
        with self._lock:
            self._lock.wait_for(lambda: self.newest > after, timeout_s)
            return self._newest if self.newest > after else None

    def other_epoch(self, than: tuple[int, int], timeout_s: float) -> Entered | None:
        """Wait for a generation in which this worker is in another group; the newest, None after `timeout_s`."""
        with self._lock:
            self._lock.wait_for(lambda: self.present.epoch != than, timeout_s)
            return self.present if self.present.epoch != than else None

    def told_until(self, number: int) -> list[Entered]:
        """The generations up to `number` that the agent has told of since the last call, in order."""
        with self._lock:
            past, self._told = ([e for e in self._told if (e.number <= number) is past] for past in (True, False))
            return past

    def tell(self, kind: str, **more: Any) -> None:
        """Send the agent a line."""
        line = json.dumps({"kind": kind, **more}).encode() + b"\n"
        with self._send_lock:
            try:
                self._socket.sendall(line)
            except OSError:
                os._exit(AGENT_DIED)

    def progress(self, **values: Any) -> None:
        """What the next heartbeat tells (step, samples, samples a second)."""
        self._progress = values

    def request_drain(self) -> None:
        """Ask the agent to let this worker leave after the step. Safe in a signal handler: the next heartbeat says
        it."""
        self._drain_requested = True

    @property
    def leaves(self) -> bool:
        """Whether this worker was told to go, by its agent or by a signal of which the agent may not know yet."""
        return self.stop_requested or self._drain_requested

    def may_commit(self, generation: int, step: int, timeout_s: float, *, replica: int = 0) -> bool:
        """Whether this generation still is the job's, so that a checkpoint of `step` may get its name."""
        with self._lock:
            self._granted.pop(step, None)
        self.tell("may_commit", generation=generation, step=step, replica=replica)
        with self._lock:
            self._lock.wait_for(lambda: step in self._granted, timeout_s)
            return self._granted.get(step, False)

    def _read(self) -> None:
        for line in self._socket.makefile("rb"):
            told = json.loads(line)
            entered = Entered.from_json(told) if told["kind"] == "enter" else None
            if entered is not None:
                # Before the main thread can know of it: what it connects to next must not be cut.
                with suppress(RuntimeError, OSError, ValueError):  # the main thread may take the group down right now
                    self.comes(entered)
            with self._lock:
                match told["kind"]:
                    case "enter":
                        self._newest = entered
                        self._told.append(self.present)
                    case "granted":
                        self._granted[told["step"]] = told["granted"]
                    case "stop":
                        self.stop_requested = True
                self._lock.notify_all()
        os._exit(AGENT_DIED)

    def _heartbeat(self, heartbeat_s: float) -> None:
        while True:
            self.tell("heartbeat", generation=self.followed, **self._progress)
            if self._drain_requested and not self._drain_told:
                self._drain_told = True
                self.tell("drain")
            time.sleep(heartbeat_s)
