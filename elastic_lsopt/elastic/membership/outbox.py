"""What an agent tells others: to whom, and what stands in a record."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import MISSING, fields, replace
from itertools import islice
from typing import Any

from elastic_lsopt.elastic.membership.generation import Change
from elastic_lsopt.elastic.membership.quorum import Ask
from elastic_lsopt.elastic.membership.record import Effect, Heartbeat, Publish, Record
from elastic_lsopt.elastic.membership.state import Peer, State

CANDIDATES = 3
"""Members that an agent without a grant reports to at a time."""
NOTHING_TOLD = {f.name: f.default for f in fields(Record) if f.default is not MISSING}
"""What a record holds unless it says otherwise."""


class Outbox:
    """Holds the state that one event changes, and the effects so far."""

    def __init__(self, state: State, now: float, *, may_vote: bool = True) -> None:
        self.s, self.now, self.may_vote = state, now, may_vote
        self.effects: list[Effect] = []

    def _set(self, **changes: Any) -> None:
        """`dataclasses.replace` at a quarter of its cost, which was half of a leader's work for a record."""
        state = object.__new__(State)
        vars(state).update(vars(self.s), **changes)
        self.s = state

    @property
    def _suspects(self) -> bool:
        return self.now >= self.s.suspect_from_s

    def _order(self, start: int = 0) -> Iterator[str]:
        """The members that may follow the host, those that I can reach, from member number `start` on, around."""
        s = self.s
        assert s.generation is not None
        members = s.generation.members
        names = (members[(start + i) % len(members)].name for i in range(len(members)))
        return (name for name in names if name != s.generation.host and name not in s.unreachable)

    def _targets(self) -> list[tuple[str, str]]:
        """Whom I report to: my leader; and without a grant a few more, others as time goes on."""
        s = self.s
        if s.generation is None:
            return [("", s.join_address)]
        names = [s.generation.host, *([s.vote.promised.name] if s.vote else [])]
        if self._suspects:
            turn = int((self.now - s.suspect_from_s) / s.rules.suspect_s)
            names += islice((name for name in self._order(turn * CANDIDATES) if name != s.name), CANDIDATES)
        return [(n, s.generation.member[n].address) for n in dict.fromkeys(names) if n != s.name]

    def _report(self) -> None:
        for target in self._targets():
            self._publish([target], answer=False)
        self._set(reported_s=self.now)

    def _publish_all(self, names: Iterable[str], change: Change | None = None) -> None:
        """One record for many readers, in my own store: no echo, so it grants nothing."""
        to = [(name, self.s.address) for name in names if name != self.s.name]
        if to:
            self._publish(to, answer=True, change=change)

    def _publish(self, to: list[tuple[str, str]], *, answer: bool, **more: Any) -> None:
        record = self._record(to[0][0] if len(to) == 1 else "", answer, **more)
        self._set(heartbeats=self.s.heartbeats + 1)
        self.effects.append(Publish(tuple(to), record))

    def _refuse(self, record: Record, refusal: str) -> None:
        """Tell an agent that it may not join; the echo says which of its name is meant."""
        answer = replace(self._record(record.name, True, refusal=refusal), echo=record.heartbeat)
        self._set(heartbeats=self.s.heartbeats + 1)
        self.effects.append(Publish(((record.name, self.s.address),), answer))

    def _publish_to_each(self, peers: Mapping[str, Peer]) -> None:
        """Answers to those who know my generation, to each its own echo; all the rest is made once."""
        told, grants, address = vars(self._record("", answer=True)), self._grants(), self.s.address
        for name, peer in peers.items():
            record = object.__new__(Record)  # as in `_set`
            vars(record).update(told, echo=peer.record.heartbeat, grants=grants(name))
            self.effects.append(Publish(((name, address),), record))
        self._set(heartbeats=self.s.heartbeats + 1)

    def _grants(self) -> Callable[[str], bool]:
        """For whom an echo is a lease: for nobody whom my own proposal evicts."""
        s, c = self.s, self.s.campaign
        if c is None or not s.leads or self.now >= c.quorum_s + s.rules.suspect_s:
            return lambda reader: False
        losing = c.value or c.adopted
        return lambda reader: losing is None or reader not in losing.evicted

    def _record(self, reader: str, answer: bool, **more: Any) -> Record:
        """What I tell `reader` ("" for many); news where it is known to be behind."""
        s, c = self.s, self.s.campaign
        peer = s.peers.get(reader) if reader else None
        if peer and s.generation and peer.record.number < s.number and not more:
            newest = s.last and peer.record.number == s.number - 1
            more = {"change": s.last} if newest else {"generation": s.generation}
        record = object.__new__(Record)  # as in `_set`
        vars(record).update(NOTHING_TOLD)
        vars(record).update(
            name=s.name,
            address=s.address,
            job=s.rules.job,
            heartbeat=Heartbeat(s.incarnation, s.heartbeats, self.now),
            answer=answer,
            number=s.number,
            vote=s.vote,
            workers=s.workers,
            leaving=s.draining,
            departing=s.departing,
            broken=s.broken,
            broken_in=s.broken_in,
            dissolving=s.departing and s.rules.replicas > 1 and s.leads and s.dissolves,
            finished=s.finished,
            lost=self._suspects,
            echo=peer.record.heartbeat if peer else None,
            grants=peer is not None and self._grants()(reader),
            ask=Ask(c.ballot, c.value) if c and (c.value or c.ballot.round) else None,
            fingerprint=() if s.vote else tuple(sorted(s.rules.fingerprint.items())),
            **more,
        )
        return record
