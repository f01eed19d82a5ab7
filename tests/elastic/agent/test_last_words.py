"""What a worker says right before its end is heard before its end is known."""

from __future__ import annotations

import queue
import sys
import time
from typing import Any

import pytest

from elastic_lsopt.elastic.agent.worker_process import WorkerProcess

PROGRAM = """
import os, socket
agent = socket.socket(fileno=int(os.environ["ELASTIC_LSOPT_LINK"]))
agent.sendall(b'{"kind": "ready"}\\n{"kind": "finished"}\\n')
os._exit(0)
"""


@pytest.mark.fast
def test_what_it_says_last_comes_before_its_end() -> None:
    """Also where this process is slow to read: one that has finished would else count as one that has left."""
    said: queue.SimpleQueue[str] = queue.SimpleQueue()

    def event(worker: WorkerProcess, line: dict[str, Any]) -> None:
        if line["kind"] == "ready":
            worker.process.wait()
            time.sleep(0.1)
        said.put(line["kind"])

    WorkerProcess("n/1", 0, [sys.executable, "-S", "-c", PROGRAM], {}, event)
    assert [said.get(timeout=60) for _ in range(3)] == ["ready", "finished", "exited"]
