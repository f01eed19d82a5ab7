"""All nodes of a job of replicas are told to go: each ends well, whoever is through first and leads."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from queue import Empty

import pytest

from elastic_lsopt.elastic.agent.agent import Agent
from tests.elastic.agent.plain_agent import entered, node

NODES, LEASE_S, LIMIT_S = 4, 2.0, 60.0
pytestmark = pytest.mark.fast


def pump(agents: list[Agent], reached: Callable[[], bool]) -> None:
    """What the agents' own loops do until then, in this thread; who is through is closed."""
    end = time.monotonic() + LIMIT_S
    while not reached():
        assert time.monotonic() < end, [agent._exit_code for agent in agents]
        for agent in agents:
            while agent._exit_code is None:
                try:
                    agent._events.get_nowait()()
                except Empty:
                    agent._tick()
                    break
            else:
                agent.mailbox.close()
        time.sleep(0.01)


@pytest.fixture
def leaving(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[list[Agent]]:
    """Four nodes of a worker each, in two replicas, told to go; the first leads, and has told its own worker to stop,
    which says the fixture's word at its end."""

    def of(name: str, endpoint: str | None) -> Agent:
        plain = node(tmp_path, name, 1, endpoint, lease_s=LEASE_S, drain_timeout_s=40.0)
        rules = replace(plain.rules, replicas=2)
        return Agent(replace(plain, rules=rules, environment={"AT_THE_STOP": request.param}))

    agents = [of("a", None)]
    try:
        for name in "bcd":
            pump(agents[:1], iter([False, True]).__next__)  # it says its status, by which the other finds it
            agents.append(of(name, agents[0].mailbox.address))
        for agent in agents:
            agent._start_worker()
        pump(agents, lambda: len({who for who, _, number, _ in entered(tmp_path) if number == newest(agents)}) == NODES)
        for agent in agents:
            # That all are leaving is known in a moment, and on a busy machine still before the first is let go.
            rules = replace(agent._state.rules, join_debounce_s=LIMIT_S)
            agent._state = replace(agent._state, rules=rules)
            agent._drain(15)
        pump(agents, lambda: agents[0]._stopping)
        yield agents
    finally:
        for agent in agents:
            for worker in agent._workers.values():
                worker.kill()
            agent.mailbox.close()


def newest(agents: list[Agent]) -> int:
    return max(agent._state.number for agent in agents)


@pytest.mark.long
@pytest.mark.parametrize("leaving", ["finished"], indirect=True)
def test_the_first_that_is_through_stays_until_the_others_know(leaving: list[Agent]) -> None:
    """Without it and the next one there would be no majority that could tell the others."""
    leader = leaving[0]
    assert leader._state.leads
    pump([leader], lambda: not leader._workers)
    through = time.monotonic()
    pump([leader], iter([False] * 10 + [True]).__next__)
    stayed = leader._exit_code is None or time.monotonic() > through + LEASE_S  # so long a pause is this machine's
    assert stayed, "it has left before anybody could hear of the end"
    pump(leaving, lambda: all(agent._exit_code is not None for agent in leaving))
    assert [agent._exit_code for agent in leaving] == [0] * NODES


@pytest.mark.long
@pytest.mark.parametrize("leaving", [""], indirect=True)
def test_without_workers_nobody_waits_for_a_majority(leaving: list[Agent]) -> None:
    """As in a job that was waiting for nodes: its workers have nothing to finish."""
    pump(leaving, lambda: all(agent._exit_code is not None for agent in leaving))
    assert [agent._exit_code for agent in leaving] == [0] * NODES
