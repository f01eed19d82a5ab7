"""A life of an agent, played again from its log, line by line."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from elastic_lsopt.elastic.agent.agent import Agent
from elastic_lsopt.elastic.agent.event_file import EventFile
from elastic_lsopt.elastic.membership import machine
from elastic_lsopt.elastic.membership.event_log import Entry, beginning, begun, lives, replay
from elastic_lsopt.elastic.membership.record import Drain, Remembered, Rules, WorkerReady
from elastic_lsopt.elastic.membership.role import Candidate, Leader, Member, Newcomer, role_of
from elastic_lsopt.elastic.membership.state import State
from tests.elastic.agent.plain_agent import node, pump
from tests.elastic.membership.model import Place, World

pytestmark = pytest.mark.fast
RULES = Rules(min_nodes=1, max_nodes=4, job="j", fingerprint={"code": "1"})


def life(names: str) -> tuple[World, dict[str, list[tuple[str, State]]]]:
    """A job that is founded, joined, loses its host and is drained; each agent's log, and its state after each line."""
    told: dict[str, list[tuple[str, State]]] = {name: [] for name in names}

    def advance(state: State, event: Any, now: float, *, may_vote: bool = True) -> Any:
        after, effects = machine.advance(state, event, now, may_vote=may_vote)
        told[state.name].append((Entry(now, event, may_vote).to_line(), after))
        return after, effects

    first = machine.found(names[0], names[0], RULES)
    told[names[0]].append((beginning(first, None, 0.0), first))
    world = World((Place(names[0], first),), RULES).spawn(names[0], advance)
    for i, name in enumerate(names[1:]):
        state = machine.newcomer(name, name, RULES, names[0], incarnation=i)
        told[name].append((beginning(state, None, 0.0), state))
        world = replace(world, places=(*world.places, Place(name, state))).spawn(name, advance)
    world = world.run(6.0, advance)
    world = world.crash(names[0]).run(8.0, advance)
    world = world.give(names[1], Drain(), advance).run(2.0, advance)
    return world, told


def test_a_life_played_again_is_the_same() -> None:
    _, told = life("abcd")
    roles = set()
    for lines in told.values():
        state = begun(lines[0][0])
        assert state == lines[0][1]
        entries = [Entry.of_line(line) for line, _ in lines[1:]]
        for (_, found, _), (_, after) in zip(replay(state, entries), lines[1:], strict=True):
            assert found == after
            roles.add(type(role_of(found)))
    assert roles == {Newcomer, Member, Candidate, Leader}
    assert sum(map(len, told.values())) > 500


def test_a_member_again_begins_as_it_was() -> None:
    world, _ = life("abc")
    disk = world.place("c").disk
    assert isinstance(disk, Remembered)
    state = machine.restarted(disk, "c", RULES, 3.0)
    assert begun(beginning(state, disk, 3.0)) == state


def test_a_line_that_is_none() -> None:
    with pytest.raises(ValueError, match="no event"):
        Entry.of_line('{"now_s": 1.0, "event": "Nothing", "may_vote": true}')


def test_what_agents_wrote_is_what_they_lived(tmp_path: Path) -> None:
    agents = [Agent(node(tmp_path, "a", 0, event_log=True))]
    pump(agents, 0.1)  # it says its status, by which the other finds it
    agents.append(Agent(node(tmp_path, "b", 0, agents[0].mailbox.address, join_timeout_s=5.0, event_log=True)))
    try:
        for agent in agents:
            agent._advance(WorkerReady(f"{agent.node.name}/1"))
        for _ in range(100):
            pump(agents, 0.1)
            if all(agent._state.number > 1 for agent in agents):
                break
        for agent in agents:
            told = list(lives((tmp_path / "elastic" / f"{agent.node.name}.events").read_text().splitlines()))
            assert told[-1][1] == agent._state and agent._state.number > 1
    finally:
        for agent in agents:
            agent.mailbox.close()


def test_a_log_that_cannot_be_written_is_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = machine.found("a", "a", RULES)
    for path in (tmp_path / "none" / "a.events", Path("/dev/full")):
        events = EventFile(path)
        for _ in range(3):
            events.begin(state, None, 0.0)
            events.add(Entry(1.0, Drain()))
    assert [record.message for record in caplog.records] == [
        f"{tmp_path}/none/a.events cannot be written (No such file or directory): this node's events are not logged.",
        "/dev/full cannot be written (No space left on device): this node's events are logged no more.",
    ]


def test_the_program_plays_a_file_again(tmp_path: Path) -> None:
    _, told = life("abc")
    file = tmp_path / "b.events"
    file.write_text("".join(line + "\n" for line, _ in told["b"]))
    command = [sys.executable, "-m", "elastic_lsopt.elastic.membership.event_log"]
    done = subprocess.run([*command, str(file)], capture_output=True, text=True, check=True, timeout=60)
    assert "-> leader of generation" in done.stdout and "-> newcomer\n" in done.stdout
    file.write_text("{}\n")
    done = subprocess.run([*command, str(file)], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and "before any beginning" in done.stderr
