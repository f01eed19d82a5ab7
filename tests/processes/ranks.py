"""Real processes for the tests: one group of ranks a world size, kept for the session, many cases run inside it.

[Note: how a case ends] Each rank answers on its own pipe. Where one raises, hangs or dies, the others get GRACE_S more
(they may wait for it in a collective); then the whole group is killed by process id, every rank's log is shown, and the
next case starts a new group. So a broken case fails by its own name, within its time limit, and spoils no other.

[Note: between two cases] A group is stopped (SIGSTOP): each of gloo's threads would else wake a hundred times a second,
and the lanes' idle groups together take a fifth of a core.
"""

from __future__ import annotations

import itertools
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from tests.processes.warm import ROOT, Popen

GRACE_S = 8.0


class RankFailure(AssertionError):
    """A case failed on some rank; the message holds every rank's end and log."""


PORTS = range(10_000, 29_000)
"""Below those that Linux gives to whoever connects or asks for any (32,768 to 60,999), and below torchrun's 29,400."""


def free_port() -> int:
    """One that stays free until it is used, a second or more later: nobody is given any of PORTS, and each process here
    begins to count in another place."""
    for port in _ports(os.getpid()):
        with socket.socket() as s, suppress(OSError):
            s.bind(("", port))
            return port
    raise AssertionError("every port is taken")


@cache
def _ports(pid: int) -> Iterator[int]:
    first = pid * 997 % len(PORTS)
    return itertools.cycle([*PORTS[first:], *PORTS[:first]])


def rank_environment(**more: str) -> dict[str, str]:
    """The environment of a rank: one thread each, no accelerator but what TESTS_ON names, this checkout on the path.
    LOCAL_SIZE is for DeepSpeed, which else asks a program for the number of sockets, 24 times an engine."""
    env = {
        k: v
        for k, v in os.environ.items()
        if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    }
    return {
        **env, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": os.environ.get("TESTS_ON", "cpu"), "PYTHONPATH": str(ROOT),
        "TOKENIZERS_PARALLELISM": "false", "LOCAL_SIZE": "1",
        "PYTHONFAULTHANDLER": "1", "PYTHONWARNINGS": "ignore", "TORCH_CPP_LOG_LEVEL": "ERROR", **more,
    }  # fmt: skip


class Ranks:
    """`world` processes in one group. `run("tests.cases.x:function", …)` calls it on every rank."""

    def __init__(self, world: int) -> None:
        self.world = world
        self._processes: list[Popen] = []

    def run(self, case: str, *, timeout_s: float = 90.0, **arguments: Any) -> list[Any]:
        """Each rank's result of `function(**arguments)`, in order. Raises RankFailure with every rank's log."""
        if not self._processes:
            self._start()
        self._signal(signal.SIGCONT)
        starts = [log.stat().st_size for log in self._logs]
        order = json.dumps({"case": case, "arguments": arguments}) + "\n"
        answers: dict[int, Any] = {}
        for p in self._processes:
            assert p.stdin
            try:
                p.stdin.write(order.encode())
                p.stdin.flush()
            except BrokenPipeError:
                pass
        self._collect(answers, time.monotonic() + timeout_s)
        if len(answers) == self.world and all("result" in a for a in answers.values()):
            self._signal(signal.SIGSTOP)
            return [answers[r]["result"] for r in range(self.world)]
        self.stop(grace_s=0.0)
        raise RankFailure(self._account(case, arguments, answers, starts, timeout_s))

    def _start(self) -> None:
        self._dir = Path(tempfile.mkdtemp(prefix="ranks-"))
        self._logs = [self._dir / f"rank{r}.log" for r in range(self.world)]
        port = str(free_port())
        for r, log in enumerate(self._logs):
            env = rank_environment(
                RANK=str(r), LOCAL_RANK=str(r), WORLD_SIZE=str(self.world), LOCAL_WORLD_SIZE=str(self.world),
                MASTER_ADDR="127.0.0.1", MASTER_PORT=port,
            )  # fmt: skip
            with log.open("wb") as out:
                self._processes.append(
                    Popen(
                        [sys.executable, "-m", "tests.processes.rank_main"],
                        cwd=ROOT,
                        env=env,
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        stderr=out,
                    )
                )

    def _collect(self, answers: dict[int, Any], end: float) -> None:
        with selectors.DefaultSelector() as selector:
            for r, p in enumerate(self._processes):
                selector.register(p.stdout, selectors.EVENT_READ, r)  # type: ignore[arg-type]
            while len(answers) < self.world and time.monotonic() < end:
                for key, _ in selector.select(timeout=0.2):
                    line = key.fileobj.readline()  # type: ignore[union-attr]
                    answers[key.data] = json.loads(line) if line else {"error": "died"}
                    selector.unregister(key.fileobj)
                    if "error" in answers[key.data]:
                        end = min(end, time.monotonic() + GRACE_S)

    def _account(self, case: str, arguments: Any, answers: Any, starts: list[int], timeout_s: float) -> str:
        lines = [f"{case}({arguments}) on {self.world} ranks:"]
        for r, log in enumerate(self._logs):
            ended = answers.get(r, {"error": f"gave no answer (limit {timeout_s} s)"})
            lines.append(f"--- rank {r}: {ended.get('error', 'passed')}")
            text = log.read_bytes()[starts[r] :].decode(errors="replace").strip()
            if text:
                lines.append("    log: " + text[-3000:].replace("\n", "\n    "))
        return "\n".join(lines)

    def _signal(self, number: int) -> None:
        for p in self._processes:
            if p.poll() is None:
                p.send_signal(number)

    def stop(self, grace_s: float = 10.0) -> None:
        """They end by themselves where nothing more is asked of them; who does not in time is killed."""
        self._signal(signal.SIGCONT)
        for p in self._processes:
            assert p.stdin
            with suppress(BrokenPipeError):
                p.stdin.close()
        end = time.monotonic() + grace_s
        for p in self._processes:
            with suppress(subprocess.TimeoutExpired):
                p.wait(timeout=max(0.0, end - time.monotonic()))
        self._signal(signal.SIGKILL)
        for p in self._processes:
            p.wait(timeout=20)
            assert p.stdout
            p.stdout.close()
        self._processes = []
