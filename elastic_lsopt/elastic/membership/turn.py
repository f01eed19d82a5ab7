"""One event taken by the membership machine; its rules and why they are safe stand in membership.py."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain, islice
from math import inf

from elastic_lsopt.elastic.membership.generation import Generation
from elastic_lsopt.elastic.membership.leader import Leader
from elastic_lsopt.elastic.membership.record import (
    Broken,
    Drain,
    DrainWorker,
    Effect,
    Event,
    Finished,
    Heard,
    KillWorkers,
    Note,
    Persist,
    Record,
    Remembered,
    Tick,
    Unreachable,
    WitnessSaid,
    WorkerExited,
    WorkerReady,
)
from elastic_lsopt.elastic.membership.state import Peer, State

MOST_BEFORE = 8
"""Heartbeats that a candidate waits for those before it, at most."""


class Turn(Leader):
    """One event: what happened on my own node, in the records that I read, and in time."""

    def take(self, event: Event) -> tuple[State, tuple[Effect, ...]]:
        """The state after `event`, and its effects in order."""
        if self.s.ended:
            return self.s, ()
        match event:
            case Tick():
                self._tick()
            case Heard(records):
                self._hear_all(records)
            case Unreachable(name):
                self._unreachable(name)
            case WitnessSaid():
                self._hear_witness(event)
            case _:
                self._own(event)
        self._offer()
        self._fence()
        self._persist()
        return self.s, tuple(self.effects)

    def _own(self, event: Event) -> None:
        s = self.s
        match event:
            case WorkerReady(worker) if worker not in s.workers:
                self._set(waiting=(*s.waiting, worker))
                return
            case WorkerExited(worker) if worker in s.waiting:
                self._set(waiting=tuple(w for w in s.waiting if w != worker))
                return
            case WorkerExited(worker) if worker in s.workers:
                self._set(
                    workers=tuple(w for w in s.workers if w != worker),
                    draining=tuple(w for w in s.draining if w != worker),
                )
            case DrainWorker(worker) if worker in s.workers and worker not in s.draining:
                self._set(draining=(*s.draining, worker))
            case Broken(number, replica) if s.generation and s.generation.replicas:
                if s.generation.replicas[replica].since != number:
                    return  # it has formed anew since
                known = s.broken_in if s.broken == s.number else ()
                self._set(broken=s.number, broken_in=tuple(sorted({*known, replica})))
            case Broken(number) if number == s.number:
                self._set(broken=number)
            case Drain() if not s.departing:
                self._set(departing=True)
                if s.vote is None or (s.generation and len(s.generation.members) == 1):
                    self._leave("drained")
                    return
            case Finished() if not s.finished:
                self._set(finished=True)
            case _:
                return
        self._announce()
        self._leave_if_done()

    def _announce(self) -> None:
        """Tell the leader what has changed on my node, or act on it where I am the leader."""
        if self.s.leads:
            self._decide()
        else:
            self._report()

    def _offer(self) -> None:
        """Ready workers are offered; a member without a lease would have to kill them, so they wait for one."""
        if not self.s.waiting or self.s.ended:
            return
        self._renew()
        s = self.s
        if s.vote is None or self.now < s.lease_until_s:
            self._set(workers=s.workers + s.waiting, offered=s.offered + s.waiting, waiting=(), finished=False)
            self._joins()
            self._announce()

    def _fence(self) -> None:
        """Without a lease no worker of a member lives: [Note: leases]."""
        s = self.s
        if s.vote is None or not s.workers or s.finished or s.ended or self.now < s.lease_until_s:
            return
        self._renew()
        if self.now >= self.s.lease_until_s:
            self.effects.append(KillWorkers(f"no quorum has granted a lease for {s.rules.lease_s:g} s"))
            self._set(workers=(), waiting=(), draining=())
            self._announce()

    def _persist(self) -> None:
        """[Note: votes] what is remembered is on disk before anything but a kill follows from it."""
        s = self.s
        if s.vote is None or s.generation is None or not self.may_vote:
            return
        if s.saved and s.saved.vote is s.vote and s.saved.generation is s.generation:
            return  # what follows is dearer
        remembered = Remembered(s.name, s.incarnation, s.generation, s.vote)
        if remembered != s.saved:
            self._set(saved=remembered)
            first = next((i for i, e in enumerate(self.effects) if not isinstance(e, KillWorkers)), len(self.effects))
            self.effects.insert(first, Persist(remembered))

    # Records in. ------------------------------------------------------------------------------------------------------

    def _hear_all(self, records: tuple[Record, ...]) -> None:
        """Each in turn; heartbeats that come together are answered together, by one record with each reader's own
        echo."""
        heartbeats: dict[str, Peer] = {}
        for record in records:
            known = heartbeats.get(record.name) or self.s.peers.get(record.name)
            if known and record.heartbeat[:2] > known.record.heartbeat[:2] and self._is_heartbeat(record, known.record):
                heartbeats[record.name] = Peer(record, self.now, self._fresh_s(record, known))
                continue
            self._answer(heartbeats)
            heartbeats = {}
            if not self.s.ended:
                self._hear(record)
        self._answer(heartbeats)

    def _answer(self, heartbeats: dict[str, Peer]) -> None:
        if not heartbeats:
            return
        peers = self.s.peers
        for name, peer in heartbeats.items():
            peers = peers.put(name, peer)
        self._set(peers=peers)
        self._publish_to_each(heartbeats)

    def _hear(self, record: Record) -> None:
        s = self.s
        known = s.peers.get(record.name)
        if s.vote is None and record.refusal:
            return self._leave(record.refusal) if record.echo and record.echo.incarnation == s.incarnation else None
        if refusal := self._refusal(record):
            if not record.answer and s.vote is not None:
                self._refuse(record, refusal)
                self.effects.append(Note(f"refused {record.name}: {refusal}"))
            return None
        if record.name == s.name or (known and record.heartbeat[:2] <= known.record.heartbeat[:2]):
            return None
        slim = record
        if record.generation or record.change or record.ask or record.fingerprint:
            slim = replace(record, generation=None, change=None, ask=None, fingerprint=())
        peer = Peer(slim, self.now, self._fresh_s(record, known))
        reachable = s.unreachable - {record.name} if record.name in s.unreachable else s.unreachable
        self._set(peers=s.peers.put(record.name, peer), unreachable=reachable)
        self._learn(record)
        if self.s.ended:
            return None
        self._take_grant(record)
        self._consider(record)
        self._count(record, known)
        s = self.s
        serves = s.vote is not None or s.leave_at_s < inf
        wanted = s.campaign or record.lost or record.vote is None or record.number < s.number
        if serves and wanted and not record.answer and not s.ended:
            self._publish([(record.name, s.address)], answer=True)
        return None

    def _is_heartbeat(self, record: Record, before: Record) -> bool:
        """Whether a member tells its leader nothing but that it lives, as nearly always: all the rest of `_hear` would
        do nothing, and be a third of the leader's work."""
        s, c = self.s, self.s.campaign
        return (
            c is not None
            and c.leader_since_s is not None
            and c.value is None
            and not record.answer
            and record.number == s.number == before.number
            and record.vote is not None
            and record.vote.promised == c.ballot
            and record.vote.accepted is None
            and (record.ask or record.change or record.generation) is None
            and not record.fingerprint
            and record.job == s.rules.job
            and record.lost == before.lost
            and record.workers == before.workers
            and record.leaving == before.leaving
            and record.departing == before.departing
            and record.broken == before.broken
            and record.broken_in == before.broken_in
            and record.finished == before.finished
            and record.name not in s.restless
            and record.name not in s.unreachable
        )

    def _refusal(self, record: Record) -> str:
        """Why this agent may not join; the first difference is named."""
        rules = self.s.rules
        if record.job != rules.job:
            return f"job {record.job!r} is not the job here, {rules.job!r}; check the endpoint and the job's id."
        theirs = dict(record.fingerprint)
        for name in sorted({*theirs, *rules.fingerprint}) if theirs else ():
            here, there = rules.fingerprint.get(name), theirs.get(name)
            if here != there:
                return f"{name} is {there} on {record.name} but {here} in the job; start it with the job's code."
        return ""

    def _learn(self, record: Record) -> None:
        """Take the news of a newer generation."""
        s = self.s
        if record.number <= s.number:
            return
        if record.generation:
            self._enter(record.generation, None)
        elif record.change and s.generation and record.number == s.number + 1:
            self._enter(s.generation.after(record.change), record.change)

    def _take_grant(self, record: Record) -> None:
        s, echo = self.s, record.echo
        if record.grants and echo and echo.incarnation == s.incarnation and record.number == s.number:
            self._set(
                lease_until_s=max(s.lease_until_s, echo.sent_s + s.rules.lease_s),
                suspect_from_s=max(s.suspect_from_s, echo.sent_s + s.rules.suspect_s),
            )

    def _consider(self, record: Record) -> None:
        """Answer a proposer. An agent that is granted a lease promises nothing to anyone but its leader."""
        s, ask = self.s, record.ask
        if s.vote is None or ask is None or record.number != s.number or not self.may_vote:
            return
        vote = s.vote.answer(ask)
        moves = ask.ballot.name != s.vote.promised.name
        if vote == s.vote or (moves and not self._suspects):
            return
        self._set(vote=vote, campaign=None, promised_at_s=self.now if moves else s.promised_at_s)
        self._report()

    # Time. ------------------------------------------------------------------------------------------------------------

    def _tick(self) -> None:
        s = self.s
        if s.generation:
            self._prune(s.generation)
        if s.leads:
            self._renew()
            self._decide()
        if self.s.vote is not None and self._suspects and self.may_vote:
            self._stand_if_due()
        if self.now >= self.s.reported_s + s.rules.heartbeat_s:
            self._ask_witness()
            self._report()
        self._leave_if_done()

    def _prune(self, generation: Generation) -> None:
        """Forget agents outside of the generation that have gone away."""
        s = self.s
        for name, peer in s.peers:
            if name not in generation.member and self.now >= peer.heard_s + s.rules.evict_s:
                self._set(peers=self.s.peers.without(name), restless=self.s.restless.without(name))

    def _stand_if_due(self) -> None:
        """Stand for leader once those before me in the order had their chance, each a heartbeat."""
        s = self.s
        assert s.vote is not None and s.generation is not None
        seen = [p.record.vote.promised for _, p in s.peers if p.record.vote and p.record.number == s.number]
        highest = max([s.vote.promised, *seen])
        if s.campaign and highest == s.campaign.ballot:
            return
        first = islice(chain(self._order(), [s.generation.host]), MOST_BEFORE)
        before = next((i for i, name in enumerate(first) if name == s.name), MOST_BEFORE)
        since_s = max(s.suspect_from_s, s.promised_at_s + s.rules.suspect_s)
        if self.now >= since_s + before * s.rules.heartbeat_s:
            self._stand(above=highest)

    def _unreachable(self, name: str) -> None:
        s = self.s
        if name == s.name:
            return
        leader = s.vote.promised.name if s.vote else s.generation.host if s.generation else ""
        suspect_from_s = min(s.suspect_from_s, self.now) if name == leader else s.suspect_from_s
        self._set(unreachable=s.unreachable | {name}, suspect_from_s=suspect_from_s)
