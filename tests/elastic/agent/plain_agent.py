"""A real agent whose workers train nothing: `python -m tests.elastic.agent.plain_agent FOLDER NAME WORKERS [ENDPOINT]`.

A worker says ready, heartbeats, and notes each generation that it is told of: a line `worker pid number gone…` in
FOLDER/entered. It lives until its agent ends it, or SIGTERM does, or the job is told to stop; with AT_THE_STOP in its
environment it says that then first.
"""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from pathlib import Path
from queue import Empty
from typing import Any

from elastic_lsopt.config.elastic import ElasticConfig
from elastic_lsopt.elastic.agent.agent import Agent
from elastic_lsopt.elastic.agent.node import Node
from elastic_lsopt.elastic.agent.node_folder import NodeFolder
from elastic_lsopt.elastic.membership.record import Rules

WORKER = """
import json, os, socket, sys, threading, time
agent = socket.socket(fileno=int(os.environ["ELASTIC_LSOPT_LINK"]))
name, number, lock = os.environ["ELASTIC_LSOPT_WORKER"], 0, threading.Lock()
sys.excepthook = threading.excepthook = lambda *_: os._exit(1)  # its agent has gone
def tell(**line):
    with lock: agent.sendall(json.dumps(line).encode() + b"\\n")
def heartbeat():
    while True:
        tell(kind="heartbeat", generation=number)
        time.sleep(0.1)
tell(kind="ready")
threading.Thread(target=heartbeat, daemon=True).start()
for line in agent.makefile("rb"):
    told = json.loads(line)
    if told["kind"] == "enter":
        number = told["number"]
        with open(sys.argv[1], "a") as out:
            out.write(" ".join([name, str(os.getpid()), str(number), *told["gone"]]) + "\\n")
    if told["kind"] == "stop":
        if word := os.environ.get("AT_THE_STOP"): tell(kind=word, stopped=True)
        os._exit(0)
"""
SECRET = b"sixteen bytes ok"


def node(folder: Path, name: str, workers: int, endpoint: str | None = None, **settings: Any) -> Node:
    """What such an agent is told; leases of 1.2 s unless `settings` say otherwise."""
    chosen = ElasticConfig(**{"lease_s": 1.2, "hang_timeout_s": 20.0, "respawn": False, **settings})
    rules = Rules(
        min_nodes=chosen.min_nodes, max_nodes=chosen.max_nodes, job="j", fingerprint={}, lease_s=chosen.lease_s,
        join_debounce_s=0.0,
    )  # fmt: skip
    return Node(
        folder=NodeFolder(folder, name), rules=rules, settings=chosen, secret=SECRET, endpoint=endpoint,
        address="127.0.0.1:0", workers=workers, command=[sys.executable, "-S", "-c", WORKER, str(folder / "entered")],
        environment={},
    )  # fmt: skip


def entered(folder: Path) -> list[tuple[str, int, int, list[str]]]:
    """(worker, pid, generation, gone) of each generation that a worker was told of, in order."""
    file = folder / "entered"
    lines = [line.split() for line in file.read_text().splitlines()] if file.exists() else []
    return [(name, int(pid), int(number), gone) for name, pid, number, *gone in lines]


def pump(agents: list[Agent], seconds: float) -> None:
    """What the agents' own loops do, in this thread."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for agent in agents:
            with suppress(Empty):
                while True:
                    agent._events.get_nowait()()
            agent._tick()
        time.sleep(0.02)


if __name__ == "__main__":
    import logging
    import os

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    where, name, workers, *endpoint = sys.argv[1:]
    os._exit(Agent(node(Path(where), name, int(workers), *endpoint)).main())
