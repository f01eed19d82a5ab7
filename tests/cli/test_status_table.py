"""What `status` says of each worker: where it is, as which process, and what it is doing."""

from __future__ import annotations

import os
import re
import time
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from elastic_lsopt.cli.status import table
from elastic_lsopt.elastic.agent import agent as agent_module
from elastic_lsopt.elastic.agent.agent import Agent
from tests.elastic.agent.plain_agent import entered, node, pump

pytestmark = pytest.mark.fast


def said(told: dict[str, Any]) -> str:
    out = StringIO()
    Console(file=out, width=100).print(table(told, []))
    return out.getvalue()


def told(agent: Agent) -> dict[str, Any]:
    """What this node says of a job that it runs alone."""
    generation = agent._generation
    return {
        "generation": generation and generation.to_json(), "reports": {agent.node.name: agent._report()},
        "host_address": "",
    }  # fmt: skip


def test_host_pid_and_state_of_real_workers(tmp_path: Path) -> None:
    agent = Agent(node(tmp_path, "n1", 1))
    try:
        agent._start_worker()
        for _ in range(100):
            pump([agent], 0.1)
            if entered(tmp_path) and agent._report()["workers"][entered(tmp_path)[0][0]]["state"] == "training":
                break
        [(worker, pid, *_)] = entered(tmp_path)
        assert re.fullmatch(r"n1/[a-z]{6}-1", worker), "a name looks like no process id"
        agent._start_worker()  # it is started, and nobody has heard of it
        host = os.uname().nodename
        lines = [line.split() for line in said(told(agent)).splitlines()]
        assert ["n1", host, str(pid), "training", "0"] in [[c for c in line if c != "│"][:5] for line in lines], lines
        [spare] = [w for name, w in agent._workers.items() if name != worker]
        assert ["n1", host, str(spare.process.pid), "warming"] in [[c for c in x if c != "│"][:4] for x in lines], lines
    finally:
        for process in agent._workers.values():
            process.kill()
        agent.mailbox.close()


def test_a_node_that_leaves(tmp_path: Path) -> None:
    members = [{"name": "n", "address": "h:1", "workers": ["n/bcdfgh-1"]}]
    generation = {"number": 2, "host": "n", "members": members}
    report = {"workers": {"n/bcdfgh-1": {"pid": 77, "state": "training"}}, "draining": True, "host": "h"}
    line = next(x for x in said({"generation": generation, "reports": {"n": report}}).splitlines() if "77" in x)
    assert "leaving" in line and "training" not in line


def test_where_a_worker_is_in_a_job_of_several_replicas() -> None:
    members = [
        {"name": "m", "address": "h:1", "workers": ["m/1", "m/2"]},
        {"name": "n", "address": "h:2", "workers": ["n/1"]},
    ]
    replicas = [{"workers": ["m/1"], "since": 2}, {"workers": ["m/2", "n/1"], "since": 5}]
    generation = {"number": 5, "host": "n", "members": members, "replicas": replicas}
    reports = {"n": {"workers": {"n/1": {"pid": 77, "step": 8}, "n/2": {"pid": 78}}, "draining": False, "host": "h"}}
    lines = [x.replace("│", " ").split() for x in said({"generation": generation, "reports": reports}).splitlines()]
    assert ["n", "h", "77", "1", "1", "8"] in lines and ["n", "h", "78"] in lines, lines


def test_a_busy_machine_makes_no_status_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it costs to say the status is the agent's own time, not that in which others had the core."""
    agent = Agent(node(tmp_path, "n1", 1))

    def pre_empted(*_: Any) -> bytes:
        time.sleep(0.1)
        return b""

    try:
        monkeypatch.setattr(agent_module, "say_status", pre_empted)
        agent._tick()
        # Those 0.1 s would be 20 s until the next; what the agent itself does takes some milliseconds.
        assert agent._status_due - time.monotonic() <= 10
    finally:
        agent.mailbox.close()
