"""A generation: who trains together, and the change that makes the next one of it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, Self

from pydantic import SerializerFunctionWrapHandler, TypeAdapter, model_serializer

from elastic_lsopt.elastic.membership import placement
from elastic_lsopt.elastic.membership.placement import Replica

FINISHED = "finished"
"""The `why` of the last generation of a job that ended well."""


class AsJSON:
    """Frozen dataclasses as plain JSON values, checked against their type hints when they are read."""

    def to_json(self) -> dict[str, Any]:
        """Lists, dicts, strings, numbers and None; `from_json` gives an equal object back."""
        return _adapter(type(self)).dump_python(self, mode="json")

    @classmethod
    def from_json(cls, value: Any) -> Self:
        """Raises ValueError naming the field that is missing or of another type."""
        return _adapter(cls).validate_json(json.dumps(value), strict=True)

    def to_bytes(self) -> bytes:
        """JSON in one line."""
        return _adapter(type(self)).dump_json(self)

    @classmethod
    def from_bytes(cls, text: bytes) -> Self:
        """As `from_json`, of what `to_bytes` gave."""
        return _adapter(cls).validate_json(text, strict=True)


@cache
def _adapter(cls: type) -> TypeAdapter[Any]:
    return TypeAdapter(cls)


@dataclass(frozen=True)
class Member(AsJSON):
    """A node agent that votes, and its workers in rank order.

    `address` is "host:port" of the agent's own store. A worker's name is used once in a job: one that is spawned
    again on the same node has a new name. A member may be without workers; it still votes.
    """

    name: str
    address: str
    workers: tuple[str, ...]


@dataclass(frozen=True)
class Change(AsJSON):
    """What generation g+1 differs in from g: the value that one vote decides, as small as what changed.

    `evicted` members are silent, so their workers are lost; `left` members asked to go. `gone` workers are dead, the
    drained ones handed their state over. `joined` are new members, or further workers of a present member. `broken`
    replicas form anew as they are.
    """

    why: str
    host: str
    term: int
    running: bool
    evicted: tuple[str, ...] = ()
    left: tuple[str, ...] = ()
    gone: tuple[str, ...] = ()
    drained: tuple[str, ...] = ()
    joined: tuple[Member, ...] = ()
    broken: tuple[int, ...] = ()


@dataclass(frozen=True)
class Generation(AsJSON):
    """The members of one agreed world.

    `host` is the member whose store is the job's; `term` the round of the vote that first proposed this generation.
    `gone` names workers of the generation before that died or were evicted, so that what they held is lost.
    `running` is False while fewer than min_nodes members have workers: members then wait and keep their state.
    `replicas` maps its workers to the replicas of a job of several, and `store_since` is the generation from which on
    they have met in the same store: its host became it then, or the job began. () and 0 in a job of one replica.
    """

    number: int
    term: int
    host: str
    members: tuple[Member, ...]
    why: str
    gone: tuple[str, ...]
    running: bool
    replicas: tuple[Replica, ...] = ()
    store_since: int = 0

    @model_serializer(mode="wrap")
    def _told(self, told: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A job of one replica says nothing of replicas."""
        whole = told(self)
        if not self.replicas:
            del whole["replicas"], whole["store_since"]
        return whole

    @cached_property
    def member(self) -> dict[str, Member]:
        """Members by name."""
        return {m.name: m for m in self.members}

    @cached_property
    def ranks(self) -> tuple[tuple[str, str], ...]:
        """(member, worker) of rank 0, 1, …: node by node.

        Survivors keep their relative order; a new member comes last, a new worker last on its node.
        """
        return tuple((m.name, worker) for m in self.members for worker in m.workers)

    def after(self, change: Change) -> Generation:
        """Generation number + 1; O(members)."""
        removed = {*change.evicted, *change.left}
        lost = {*change.gone, *change.drained}
        joined = {m.name: m for m in change.joined}
        members = [
            Member(m.name, m.address, tuple(w for w in m.workers if w not in lost) + _workers(joined.pop(m.name, None)))
            if m.name in joined or not lost.isdisjoint(m.workers)
            else m
            for m in self.members
            if m.name not in removed
        ]
        evicted = tuple(w for name in change.evicted for w in self.member[name].workers if w not in change.gone)
        number = self.number + 1
        everyone = (*members, *joined.values())
        return Generation(
            number=number,
            term=change.term,
            host=change.host,
            members=everyone,
            why=change.why,
            gone=change.gone + evicted,
            running=change.running,
            replicas=self._replicas_after(change, [m.workers for m in everyone]) if self.replicas else (),
            store_since=self._store_since_after(change, everyone) if self.replicas else 0,
        )

    def _store_since_after(self, change: Change, members: tuple[Member, ...]) -> int:
        """Where nobody has lived through, what was said in the store is of a job that is over."""
        before = {w for _, w in self.ranks}
        same = change.host == self.host and any(w in before for m in members for w in m.workers)
        return self.store_since if same else self.number + 1

    def _replicas_after(self, change: Change, nodes: list[tuple[str, ...]]) -> tuple[Replica, ...]:
        """A replica rides through a change that leaves its workers as they are; nobody does through a pause."""
        still = self.running and change.running
        anew = change.broken if still else range(len(self.replicas))
        move = not (change.gone or change.evicted)
        return placement.after(self.replicas, nodes, self.number + 1, move=move, anew=anew)


def _workers(member: Member | None) -> tuple[str, ...]:
    return member.workers if member else ()
