"""The events that an agent took, one JSON object a line, from which its whole life can be played again.

    {"began": "newcomer", "name": "b", …}                      how the agent started: founder, newcomer or member again
    {"now_s": 12.5, "event": "Heard", "records": [ … ]}        what happened, by the agent's own clock

The machine is pure, so the same beginning and the same events give the same states and effects: a fault that a job has
met on a cluster is looked at on a desk, event by event:

    python -m elastic_lsopt.elastic.membership.event_log run/elastic/host-1.events
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, get_args

from pydantic import TypeAdapter

from elastic_lsopt.elastic.membership import machine
from elastic_lsopt.elastic.membership.record import Effect, Event, Remembered, Rules
from elastic_lsopt.elastic.membership.role import role_of
from elastic_lsopt.elastic.membership.state import State

KINDS = {kind.__name__: kind for kind in get_args(Event)}


@cache
def _adapter(kind: type) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


@dataclass(frozen=True)
class Entry:
    """One event, when it came, and whether the agent could vote then (its disk took what must be remembered)."""

    now_s: float
    event: Event
    may_vote: bool = True

    def to_line(self) -> str:
        told = {"now_s": self.now_s, "event": type(self.event).__name__, "may_vote": self.may_vote}
        return json.dumps(told | _adapter(type(self.event)).dump_python(self.event, mode="json"))

    @staticmethod
    def of_line(line: str) -> Entry:
        """Raises ValueError for a line that `to_line` did not write."""
        told = json.loads(line)
        now_s, may_vote, kind = told.pop("now_s"), told.pop("may_vote"), KINDS.get(told.pop("event"))
        if kind is None:
            raise ValueError(f"{line[:80]!r} is no event.")
        return Entry(now_s, _adapter(kind).validate_json(json.dumps(told), strict=True), may_vote)


def beginning(state: State, remembered: Remembered | None, now_s: float) -> str:
    """The first line: how an agent in this state began; `remembered` where it is a member again."""
    told: dict[str, Any] = {
        "began": "member" if remembered is not None else "founder" if state.vote is not None else "newcomer",
        "name": state.name, "address": state.address, "now_s": now_s, "joins": state.join_address,
        "incarnation": state.incarnation, "rules": _adapter(Rules).dump_python(state.rules, mode="json"),
        "remembered": None if remembered is None else remembered.to_json(),
    }  # fmt: skip
    return json.dumps(told)


def begun(line: str) -> State:
    """The state of `beginning`."""
    told = json.loads(line)
    rules, name, address = _adapter(Rules).validate_python(told["rules"]), told["name"], told["address"]
    if told["began"] == "member":
        return machine.restarted(Remembered.from_json(told["remembered"]), address, rules, told["now_s"])
    if told["began"] == "founder":
        return machine.found(name, address, rules)
    return machine.newcomer(name, address, rules, told["joins"], told["incarnation"])


def lives(lines: Iterable[str]) -> Iterator[tuple[Entry, State, tuple[Effect, ...]]]:
    """As `replay`, of a whole file: each beginning starts a life. Raises ValueError for a line that is neither."""
    state: State | None = None
    for line in lines:
        if line.startswith('{"began"'):
            state = begun(line)
        elif state is None:
            raise ValueError(f"{line[:80]!r} comes before any beginning.")
        else:
            for entry, after, effects in replay(state, [Entry.of_line(line)]):
                yield entry, after, effects
                state = after


def replay(state: State, entries: Iterable[Entry]) -> Iterator[tuple[Entry, State, tuple[Effect, ...]]]:
    """Each event with the state after it and its effects."""
    for entry in entries:
        state, effects = machine.advance(state, entry.event, entry.now_s, may_vote=entry.may_vote)
        yield entry, state, effects


def main(path: str) -> None:
    """Print what each event made of the agent: its role and generation, and the effects."""
    with open(path, encoding="utf-8") as file:
        for entry, state, effects in lives(file):
            role = type(role_of(state)).__name__.lower()
            place = f" of generation {state.number}" if state.number >= 0 else ""
            print(f"{entry.now_s:.3f} {type(entry.event).__name__} -> {role}{place}")
            for effect in effects:
                print(f"    {effect}")


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except (IndexError, OSError, ValueError) as error:
        sys.exit(f"event_log: {error or 'name the file of events'}; an agent with elastic.event_log writes one.")
