"""One event taken by the membership machine; its rules and why they are safe stand in membership.py."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from math import inf
from typing import Any

from elastic_lsopt.elastic.change import differs, next_change, urgent
from elastic_lsopt.elastic.generation import FINISHED, Change, Generation
from elastic_lsopt.elastic.quorum import Accepted, Ask, Ballot, Vote, decides, quorum_time
from elastic_lsopt.elastic.record import (
    AskWitness,
    Beat,
    Broken,
    Drain,
    DrainWorker,
    Effect,
    Enter,
    Event,
    Finished,
    Heard,
    KillWorkers,
    Leave,
    Note,
    Persist,
    Publish,
    Record,
    Remembered,
    Tick,
    Unreachable,
    WitnessSaid,
    WorkerExited,
    WorkerReady,
)
from elastic_lsopt.elastic.state import Campaign, Peer, State
from elastic_lsopt.elastic.table import Table

CANDIDATES = 3
"""Members that an agent without a grant reports to at a time."""


class Turn:
    """Holds the state that one event changes, and the effects so far."""

    def __init__(self, state: State, now: float) -> None:
        self.s, self.now = state, now
        self.effects: list[Effect] = []

    def take(self, event: Event) -> tuple[State, tuple[Effect, ...]]:
        """The state after `event`, and its effects in order."""
        if self.s.ended:
            return self.s, ()
        match event:
            case Tick():
                self._tick()
            case Heard(record):
                self._hear(record)
            case Unreachable(name):
                self._unreachable(name)
            case WitnessSaid():
                self._hear_witness(event)
            case _:
                self._own(event)
        self._fence()
        self._persist()
        return self.s, tuple(self.effects)

    def _set(self, **changes: Any) -> None:
        self.s = replace(self.s, **changes)

    # My own node. ----------------------------------------------------------------------------------------------------

    def _own(self, event: Event) -> None:
        s = self.s
        match event:
            case WorkerReady(worker) if worker not in s.workers:
                self._set(workers=(*s.workers, worker), offered=(*s.offered, worker), finished=False)
                self._joins()
            case WorkerExited(worker) if worker in s.workers:
                self._set(
                    workers=tuple(w for w in s.workers if w != worker),
                    draining=tuple(w for w in s.draining if w != worker),
                )
            case DrainWorker(worker) if worker in s.workers and worker not in s.draining:
                self._set(draining=(*s.draining, worker))
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

    def _fence(self) -> None:
        """Without a lease no worker of a member lives: [Note: leases]."""
        s = self.s
        if s.vote is None or not s.workers or s.finished or s.ended or self.now < s.lease_until_s:
            return
        self._renew()
        if self.now >= self.s.lease_until_s:
            self.effects.append(KillWorkers(f"no quorum has granted a lease for {s.rules.lease_s:g} s"))
            self._set(workers=(), draining=())
            self._announce()

    def _persist(self) -> None:
        """[Note: votes] what is remembered is on disk before anything but a kill follows from it."""
        s = self.s
        if s.vote is None or s.generation is None:
            return
        remembered = Remembered(s.name, s.incarnation, s.generation, s.vote)
        if remembered != s.saved:
            self._set(saved=remembered)
            first = next((i for i, e in enumerate(self.effects) if not isinstance(e, KillWorkers)), len(self.effects))
            self.effects.insert(first, Persist(remembered))

    def _leave(self, why: str) -> None:
        self.effects.append(Leave(why))
        self._set(ended=True)

    # Records in. -----------------------------------------------------------------------------------------------------

    def _hear(self, record: Record) -> None:
        s = self.s
        if s.vote is None and record.refusal:
            return self._leave(record.refusal)
        if refusal := self._refusal(record):
            if not record.answer and s.vote is not None:
                self._publish([(record.name, s.address)], answer=True, refusal=refusal)
                self.effects.append(Note(f"refused {record.name}: {refusal}"))
            return None
        known = s.peers.get(record.name)
        if record.name == s.name or (known and record.beat[:2] <= known.record.beat[:2]):
            return None
        slim = replace(record, generation=None, change=None, ask=None, fingerprint=())
        peer = Peer(slim, self.now, known.fresh_s if known else -inf)
        self._set(peers=s.peers.put(record.name, peer), unreachable=s.unreachable - {record.name})
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
        if s.vote is None or ask is None or record.number != s.number:
            return
        vote = s.vote.answer(ask)
        moves = ask.ballot.name != s.vote.promised.name
        if vote == s.vote or (moves and not self._suspects):
            return
        self._set(vote=vote, campaign=None, moved_s=self.now if moves else s.moved_s)
        self._report()

    # The leader and the candidate. -----------------------------------------------------------------------------------

    def _count(self, record: Record, known: Peer | None) -> None:
        """Count a member's promise, acceptance and echo; note what it wants changed."""
        s, c, vote = self.s, self.s.campaign, record.vote
        peer = s.peers.get(record.name)
        if c is None or s.generation is None or peer is None:
            return
        if vote and record.number == s.number and record.name in s.generation.member:
            echo = record.echo
            if vote.promised == c.ballot and echo and echo.incarnation == s.incarnation:
                self._set(peers=s.peers.put(record.name, replace(peer, fresh_s=max(peer.fresh_s, echo.sent_s))))
            if c.led_s is None and vote.promised == c.ballot:
                best = max((a for a in (c.best, vote.accepted) if a), key=lambda a: a.ballot, default=None)
                self._set(campaign=replace(c, promises=c.promises.put(record.name, None), best=best))
                self._lead_if_promised()
            elif c.value and vote.accepted and vote.accepted.ballot == c.ballot and record.name not in c.accepts:
                self._set(campaign=replace(c, accepts=c.accepts.put(record.name, None)))
                self._commit_if_accepted()
        self._note_wish(record, known.record if known else None)

    def _note_wish(self, record: Record, before: Record | None) -> None:
        """Keep what a record wants changed; act at once on a death or a drain, or where the job is full."""
        s = self.s
        if s.generation is None or not s.campaign:
            return
        if not differs(s.generation, record):
            if record.name in s.restless:
                self._set(restless=s.restless.without(record.name))
            return
        news = before is None or (before.workers, before.leaving, before.departing, before.broken) != (
            record.workers, record.leaving, record.departing, record.broken
        )  # fmt: skip
        self._set(restless=s.restless.put(record.name, None))
        if urgent(s.generation, record):
            if news:
                self._decide()
        elif news:
            self._joins()
            if len(s.generation.members) + len(self.s.restless) >= s.rules.max_nodes:
                self._decide()

    def _joins(self) -> None:
        first_s, _ = self.s.joins_s or (self.now, self.now)
        self._set(joins_s=(first_s, self.now))

    def _stand(self, above: Ballot) -> None:
        """Become a candidate in a round above every ballot that was heard of."""
        s = self.s
        assert s.vote is not None
        ballot = Ballot(above.round + 1, s.name)
        accepted = s.vote.accepted
        peers = Table.of({name: replace(p, fresh_s=-inf) for name, p in s.peers})
        campaign = Campaign(ballot, led_s=None, promises=Table().put(s.name, None), best=accepted)
        self._set(vote=Vote(ballot, accepted), campaign=campaign, moved_s=self.now, peers=peers)
        self.effects.append(Note(f"stands for leader of generation {s.number} in round {ballot.round}"))
        self._lead_if_promised()
        self._report()

    def _lead_if_promised(self) -> None:
        s, c = self.s, self.s.campaign
        assert s.generation is not None and c is not None
        witnessed = bool(c.witness and c.witness.promised == c.ballot)
        tie = witnessed if s.rules.witness else s.generation.host in c.promises
        if not decides(len(s.generation.members), len(c.promises), tie):
            return
        best = max(
            (a for a in (c.best, witnessed and c.witness and c.witness.accepted) if a),
            key=lambda a: a.ballot,
            default=None,
        )
        restless = {n: None for n, p in s.peers if differs(s.generation, p.record)}
        self._joins()
        self._set(
            campaign=replace(c, led_s=self.now, adopted=best.change if best else None), restless=Table.of(restless)
        )
        self._renew()
        self._decide()

    def _decide(self) -> None:
        """Propose what is due, unless a proposal is out already."""
        s, c = self.s, self.s.campaign
        if c is None or c.led_s is None or c.value:
            return
        if c.adopted:
            change = None if c.adopted.evicted and self.now < c.led_s + s.rules.evict_s else c.adopted
        else:
            change = next_change(s, self._record("", answer=True), self.now)
        if change:
            assert s.generation is not None
            vote = Vote(c.ballot, Accepted(c.ballot, change))
            self._set(vote=vote, campaign=replace(c, value=change, accepts=Table().put(s.name, None)))
            if len(s.generation.members) > 1:
                self._publish_all(m.name for m in s.generation.members)
            self._commit_if_accepted()

    def _commit_if_accepted(self) -> None:
        s, c = self.s, self.s.campaign
        assert s.generation is not None and c is not None and c.value is not None
        witnessed = bool(c.witness and c.witness.accepted and c.witness.accepted.ballot == c.ballot)
        tie = witnessed if s.rules.witness else s.generation.host in c.accepts
        if not decides(len(s.generation.members), len(c.accepts), tie):
            return
        audience = [m.name for m in s.generation.members] + [
            n for n, p in s.peers if n not in s.generation.member and p.record.number == s.number
        ]
        behind = [n for n, p in s.peers if n not in s.generation.member and p.record.number < s.number]
        self._enter(s.generation.after(c.value), c.value)
        if not self.s.ended:
            self._publish_all(audience, change=c.value)
            for name in behind:
                self._publish([(name, s.address)], answer=True, generation=self.s.generation)

    def _enter(self, new: Generation, change: Change | None) -> None:
        """Generation `new` is decided."""
        s = self.s
        entry = new.member.get(s.name)
        mine = entry is not None and (s.vote is not None or (bool(entry.workers) and {*entry.workers} <= {*s.offered}))
        leads = mine and new.host == s.name
        before = s.campaign if s.leads else None
        since_s = before.led_s if before else self.now
        peers = {n: replace(p, fresh_s=-inf) for n, p in s.peers}
        ballot = Ballot(0, new.host)
        self._set(
            generation=new,
            last=change,
            vote=Vote(ballot) if mine else None,
            moved_s=-inf,
            suspect_from_s=max(s.suspect_from_s, self.now + s.rules.suspect_s),
            peers=Table.of(peers),
            restless=Table.of({n: None for n, p in peers.items() if differs(new, p.record)}) if leads else Table(),
            joins_s=None,
            campaign=Campaign(ballot, since_s, quorum_s=before.quorum_s if before else -inf) if leads else None,
        )
        if mine or (s.vote is not None and s.departing):
            self.effects.append(Enter(new))
        if new.why == FINISHED or (s.departing and not mine):
            # Others have the news from a leader alone, so it stays until they have.
            why = FINISHED if new.why == FINISHED else "drained"
            self._set(leave_at_s=self.now + s.rules.lease_s if s.leads else self.now, leave_why=why)
            self._report()
            self._leave_if_done()
        elif s.vote is not None and not mine:
            self.effects.append(KillWorkers(f"generation {new.number} was formed without this node: {new.why}"))
            self._set(workers=(), offered=(), draining=())
        elif leads:
            if len(self.s.restless) or differs(new, self._record("", answer=True)):
                self._joins()
            self._renew()
            self._decide()

    def _renew(self) -> None:
        """A leader's own lease, and its right to grant: from the newest beat that a quorum has echoed."""
        s, c = self.s, self.s.campaign
        if c is None or c.led_s is None or s.generation is None:
            return
        fresh = {name: p.fresh_s for name, p in s.peers}
        fresh[s.name] = self.now
        tie_s = c.witness_s if s.rules.witness else fresh.get(s.generation.host, -inf)
        quorum_s = max(c.quorum_s, quorum_time((fresh.get(m.name, -inf) for m in s.generation.members), tie_s))
        self._set(
            campaign=replace(c, quorum_s=quorum_s),
            lease_until_s=max(s.lease_until_s, quorum_s + s.rules.lease_s),
            suspect_from_s=max(s.suspect_from_s, quorum_s + s.rules.suspect_s),
        )

    def _hear_witness(self, said: WitnessSaid) -> None:
        s, c = self.s, self.s.campaign
        if c is None or said.number != s.number or said.vote.promised != c.ballot:
            return
        self._set(campaign=replace(c, witness=said.vote, witness_s=max(c.witness_s, said.sent_s)))
        if c.led_s is None:
            self._lead_if_promised()
        elif c.value:
            self._commit_if_accepted()

    def _ask_witness(self) -> None:
        """Where half of the members are here and no more, the witness breaks the tie."""
        s, c = self.s, self.s.campaign
        if c is None or s.generation is None or not s.rules.witness or len(s.generation.members) % 2:
            return
        voted = c.promises if c.led_s is None else c.accepts
        renewing = c.led_s is not None and self.now >= c.quorum_s + s.rules.suspect_s / 2
        if renewing or 2 * len(voted) == len(s.generation.members):
            self.effects.append(AskWitness(s.number, Ask(c.ballot, c.value), self.now))

    # Time. -----------------------------------------------------------------------------------------------------------

    @property
    def _suspects(self) -> bool:
        return self.now >= self.s.suspect_from_s

    def _tick(self) -> None:
        s = self.s
        if s.generation:
            self._prune(s.generation)
        if s.leads:
            self._renew()
            self._decide()
        if self.s.vote is not None and self._suspects:
            self._stand_if_due()
        if self.now >= self.s.reported_s + s.rules.beat_s:
            self._ask_witness()
            self._report()
        self._leave_if_done()

    def _leave_if_done(self) -> None:
        """A leaver goes once its own workers have ended, and a leader once all others know why."""
        s = self.s
        if s.leave_at_s == inf or s.generation is None or (s.workers and not s.finished):
            return
        others = (s.peers.get(m.name) for m in s.generation.members if m.name != s.name)
        if self.now >= s.leave_at_s or all(p and p.record.number >= s.number for p in others):
            self._leave(s.leave_why)

    def _prune(self, generation: Generation) -> None:
        """Forget agents outside of the generation that have gone away."""
        s = self.s
        for name, peer in s.peers:
            if name not in generation.member and self.now >= peer.heard_s + s.rules.evict_s:
                self._set(peers=self.s.peers.without(name), restless=self.s.restless.without(name))

    def _stand_if_due(self) -> None:
        """Stand for leader once those before me in the order had their chance, each a beat."""
        s = self.s
        assert s.vote is not None and s.generation is not None
        seen = [p.record.vote.promised for _, p in s.peers if p.record.vote and p.record.number == s.number]
        highest = max([s.vote.promised, *seen])
        if s.campaign and highest == s.campaign.ballot:
            return
        before = next(i for i, name in enumerate([*self._order(), s.generation.host]) if name == s.name)
        since_s = max(s.suspect_from_s, s.moved_s + s.rules.suspect_s)
        if self.now >= since_s + min(before, 8) * s.rules.beat_s:
            self._stand(above=highest)

    def _order(self) -> list[str]:
        """The members that may follow the host, those that I can reach."""
        s = self.s
        assert s.generation is not None
        return [m.name for m in s.generation.members if m.name != s.generation.host and m.name not in s.unreachable]

    def _unreachable(self, name: str) -> None:
        s = self.s
        if name == s.name:
            return
        leader = s.vote.promised.name if s.vote else s.generation.host if s.generation else ""
        suspect_from_s = min(s.suspect_from_s, self.now) if name == leader else s.suspect_from_s
        self._set(unreachable=s.unreachable | {name}, suspect_from_s=suspect_from_s)

    # Records out. ----------------------------------------------------------------------------------------------------

    def _targets(self) -> list[tuple[str, str]]:
        """Whom I report to: my leader; and without a grant a few more, others as time goes on."""
        s = self.s
        if s.generation is None:
            return [("", s.join_address)]
        names = [s.generation.host, *([s.vote.promised.name] if s.vote else [])]
        if self._suspects:
            order = [name for name in self._order() if name != s.name]
            turn = int((self.now - s.suspect_from_s) / s.rules.suspect_s) * CANDIDATES if order else 0
            names += [order[(turn + i) % len(order)] for i in range(min(CANDIDATES, len(order)))]
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
        self._set(beats=self.s.beats + 1)
        self.effects.append(Publish(tuple(to), record))

    def _record(self, reader: str, answer: bool, **more: Any) -> Record:
        """What I tell `reader` ("" for many); news where it is known to be behind."""
        s, c = self.s, self.s.campaign
        peer = s.peers.get(reader)
        if peer and s.generation and peer.record.number < s.number and not more:
            newest = s.last and peer.record.number == s.number - 1
            more = {"change": s.last} if newest else {"generation": s.generation}
        losing = (c.value or c.adopted) if c else None
        granting = s.leads and c is not None and self.now < c.quorum_s + s.rules.suspect_s
        return Record(
            name=s.name,
            address=s.address,
            job=s.rules.job,
            beat=Beat(s.incarnation, s.beats, self.now),
            answer=answer,
            number=s.number,
            vote=s.vote,
            workers=s.workers,
            leaving=s.draining,
            departing=s.departing,
            broken=s.broken,
            finished=s.finished,
            lost=self._suspects,
            echo=peer.record.beat if peer else None,
            grants=granting and peer is not None and not (losing and reader in losing.evicted),
            ask=Ask(c.ballot, c.value) if c and (c.value or c.ballot.round) else None,
            fingerprint=() if s.vote else tuple(sorted(s.rules.fingerprint.items())),
            **more,
        )
