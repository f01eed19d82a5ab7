"""A life of an agent, played again from its log, line by line."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from elastic_lsopt.elastic.membership import machine
from elastic_lsopt.elastic.membership.event_log import Entry, beginning, begun, replay
from elastic_lsopt.elastic.membership.record import Drain, Remembered, Rules
from elastic_lsopt.elastic.membership.role import Candidate, Leader, Member, Newcomer, role_of
from elastic_lsopt.elastic.membership.state import State
from tests.elastic.model import Place, World

pytestmark = pytest.mark.fast
RULES = Rules(min_nodes=1, max_nodes=4, job="j", fingerprint={"code": "1"})


def lives(names: str) -> tuple[World, dict[str, list[tuple[str, State]]]]:
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
    _, told = lives("abcd")
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
    world, _ = lives("abc")
    disk = world.place("c").disk
    assert isinstance(disk, Remembered)
    state = machine.restarted(disk, "c", RULES, 3.0)
    assert begun(beginning(state, disk, 3.0)) == state


def test_a_line_that_is_none() -> None:
    with pytest.raises(ValueError, match="no event"):
        Entry.of_line('{"now_s": 1.0, "event": "Nothing", "may_vote": true}')
