"""Elections and proposals: how one member leads an instance, and what it does until the next generation is decided."""

from __future__ import annotations

from dataclasses import replace
from math import inf

from elastic_lsopt.elastic.membership.change import differs, next_change, urgent
from elastic_lsopt.elastic.membership.generation import FINISHED, Change, Generation
from elastic_lsopt.elastic.membership.outbox import Outbox
from elastic_lsopt.elastic.membership.placement import uneven
from elastic_lsopt.elastic.membership.quorum import Accepted, Ask, Ballot, Vote, decides, quorum_time
from elastic_lsopt.elastic.membership.record import AskWitness, Enter, KillWorkers, Leave, Note, Record, WitnessSaid
from elastic_lsopt.elastic.membership.shared_map import Table
from elastic_lsopt.elastic.membership.state import Campaign, Peer


class Leader(Outbox):
    """The part of a leader or a candidate in one event."""

    def _count(self, record: Record, known: Peer | None) -> None:
        """Count a member's promise, acceptance and echo; note what it wants changed."""
        s, c, vote = self.s, self.s.campaign, record.vote
        peer = s.peers.get(record.name)
        if c is None or s.generation is None or peer is None:
            return
        if vote and record.number == s.number and record.name in s.generation.member:
            if (fresh_s := self._fresh_s(record, peer)) > peer.fresh_s:  # a generation, or a ballot, of this very event
                self._set(peers=s.peers.put(record.name, replace(peer, fresh_s=fresh_s)))
            if c.leader_since_s is None and vote.promised == c.ballot:
                best = max((a for a in (c.best, vote.accepted) if a), key=lambda a: a.ballot, default=None)
                self._set(campaign=replace(c, promises=c.promises.put(record.name, None), best=best))
                self._lead_if_promised()
            elif c.value and vote.accepted and vote.accepted.ballot == c.ballot and record.name not in c.accepts:
                self._set(campaign=replace(c, accepts=c.accepts.put(record.name, None)))
                self._commit_if_accepted()
        self._note_wish(record, known.record if known else None)

    def _fresh_s(self, record: Record, known: Peer | None) -> float:
        """When I sent the newest heartbeat that a member has echoed under my ballot, with this record."""
        s, c, vote, echo = self.s, self.s.campaign, record.vote, record.echo
        before_s = known.fresh_s if known else -inf
        if c is None or s.generation is None or vote is None or echo is None or record.number != s.number:
            return before_s
        if vote.promised != c.ballot or echo.incarnation != s.incarnation or record.name not in s.generation.member:
            return before_s
        return max(before_s, echo.sent_s)

    def _note_wish(self, record: Record, before: Record | None) -> None:
        """Keep what a record wants changed; act at once on a death or a drain, or where the job is full."""
        s = self.s
        if s.generation is None or not s.campaign:
            return
        if not differs(s.generation, record):
            if record.name in s.restless:
                self._set(restless=s.restless.without(record.name))
            return
        news = before is None or (
            before.workers, before.leaving, before.departing, before.broken, before.broken_in
        ) != (record.workers, record.leaving, record.departing, record.broken, record.broken_in)  # fmt: skip
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
        campaign = Campaign(ballot, leader_since_s=None, promises=Table().put(s.name, None), best=accepted)
        self._set(vote=Vote(ballot, accepted), campaign=campaign, promised_at_s=self.now, peers=peers)
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
            campaign=replace(c, leader_since_s=self.now, adopted=best.change if best else None),
            restless=Table.of(restless),
            even_out_at_s=self._even_out_at_s(s.generation),
        )
        self._renew()
        self._decide()

    def _decide(self) -> None:
        """Propose what is due, unless a proposal is out already."""
        s, c = self.s, self.s.campaign
        if c is None or c.leader_since_s is None or c.value or not self.may_vote:
            return
        if c.adopted:
            change = None if c.adopted.evicted and self.now < c.leader_since_s + s.rules.evict_s else c.adopted
        else:
            own = self._record("", answer=True)
            if s.rules.replicas > 1 and s.let_go_at_s == inf and self._somebody_departs(own):
                self._set(let_go_at_s=self.now + s.rules.join_debounce_s)
            change = next_change(self.s, own, self.now)
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

    def _renew(self) -> None:
        """A leader's own lease, and its right to grant: from the newest heartbeat that a quorum has echoed."""
        s, c = self.s, self.s.campaign
        if c is None or c.leader_since_s is None or s.generation is None:
            return
        fresh = {name: p.fresh_s for name, p in s.peers}
        fresh[s.name] = self.now
        tie_s = c.witness_s if s.rules.witness else fresh.get(s.generation.host, -inf)
        quorum_s = max(c.quorum_s, quorum_time([fresh.get(name, -inf) for name in s.generation.member], tie_s))
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
        if c.leader_since_s is None:
            self._lead_if_promised()
        elif c.value:
            self._commit_if_accepted()

    def _ask_witness(self) -> None:
        """Where half of the members are here and no more, the witness breaks the tie."""
        s, c = self.s, self.s.campaign
        if c is None or s.generation is None or not s.rules.witness or len(s.generation.members) % 2:
            return
        voted = c.promises if c.leader_since_s is None else c.accepts
        renewing = c.leader_since_s is not None and self.now >= c.quorum_s + s.rules.suspect_s / 2
        if renewing or 2 * len(voted) == len(s.generation.members):
            self.effects.append(AskWitness(s.number, Ask(c.ballot, c.value), self.now))

    # The next generation. ---------------------------------------------------------------------------------------------

    def _enter(self, new: Generation, change: Change | None) -> None:
        """Generation `new` is decided."""
        s = self.s
        entry = new.member.get(s.name)
        mine = entry is not None and (s.vote is not None or (bool(entry.workers) and {*entry.workers} <= {*s.offered}))
        leads = mine and new.host == s.name
        before = s.campaign if s.leads else None
        since_s = before.leader_since_s if before else self.now
        peers = {n: replace(p, fresh_s=-inf) for n, p in s.peers}
        ballot = Ballot(0, new.host)
        still_broken = self._still_broken(new)
        self._set(
            generation=new,
            last=change,
            vote=Vote(ballot) if mine else None,
            promised_at_s=-inf,
            suspect_from_s=max(s.suspect_from_s, self.now + s.rules.suspect_s),
            peers=Table.of(peers),
            restless=Table.of({n: None for n, p in peers.items() if differs(new, p.record)}) if leads else Table(),
            joins_s=None,
            broken=new.number if still_broken else s.broken,
            broken_in=still_broken,
            even_out_at_s=self._even_out_at_s(new) if leads else inf,
            let_go_at_s=inf,
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
            self._set(workers=(), waiting=(), offered=(), draining=())
        elif leads:
            if len(self.s.restless) or differs(new, self._record("", answer=True)):
                self._joins()
            self._renew()
            self._decide()

    def _still_broken(self, new: Generation) -> tuple[int, ...]:
        """The replicas that broke on my node and that `new`, which others have asked for, does not form anew."""
        s = self.s
        if s.generation is None or s.broken != s.number:
            return ()
        return tuple(k for k in s.broken_in if new.replicas[k].since == s.generation.replicas[k].since)

    def _somebody_departs(self, own: Record) -> bool:
        restless = (self.s.peers.get(name) for name, _ in self.s.restless)
        return own.departing or any(peer is not None and peer.record.departing for peer in restless)

    def _even_out_at_s(self, generation: Generation) -> float:
        return self.now + self.s.rules.even_out_s if uneven(generation.replicas) else inf

    def _leave_if_done(self) -> None:
        """A leaver goes once its own workers have ended, and a leader once all others know why."""
        s = self.s
        if s.leave_at_s == inf or s.generation is None or (s.workers and not s.finished):
            return
        others = (s.peers.get(m.name) for m in s.generation.members if m.name != s.name)
        if self.now >= s.leave_at_s or all(p and p.record.number >= s.number for p in others):
            self._leave(s.leave_why)

    def _leave(self, why: str) -> None:
        self.effects.append(Leave(why))
        self._set(ended=True)
