"""What the leader proposes: the difference between the generation and what its agents report."""

from __future__ import annotations

from elastic_lsopt.elastic.membership.generation import FINISHED, Change, Generation, Member
from elastic_lsopt.elastic.membership.record import Record
from elastic_lsopt.elastic.membership.state import State


def differs(generation: Generation, record: Record) -> bool:
    """Whether a record asks for a change: workers came, died or leave, or a newcomer has ready ones."""
    member = generation.member.get(record.name)
    if member is None:
        return bool(record.workers) and record.vote is None and not record.departing
    if record.departing or record.broken == generation.number or _disowned(generation, record):
        return True
    return member.workers != record.workers or bool(record.leaving)


def _disowned(generation: Generation, record: Record) -> bool:
    """Whether the agent knows that generation and does not take itself for the member of its name."""
    return record.vote is None and record.number == generation.number


def urgent(generation: Generation, record: Record) -> bool:
    """Whether the change cannot wait for more joins: somebody of the generation is dead or leaves."""
    member = generation.member.get(record.name)
    if member is None:
        return False
    return (
        record.departing
        or record.broken == generation.number
        or _disowned(generation, record)
        or any(w not in record.workers or w in record.leaving for w in member.workers)
    )


def joins_due(state: State, now: float) -> bool:
    """Whether the waiting joins have been still for join_debounce_s, or waited three times that in all."""
    if state.joins_s is None:
        return False
    first_s, newest_s = state.joins_s
    debounce_s = state.rules.join_debounce_s
    return now >= min(newest_s + debounce_s, first_s + 3 * debounce_s)


def next_change(state: State, own: Record, now: float) -> Change | None:
    """The change that this leader should propose now, None for none. `own` is the leader's own record.

    A death, a drain or a lost host is proposed at once, and ready joins ride along; joins alone wait for each other,
    and for min_nodes where the generation is not running. Who leaves waits for the generation after a death: he may
    hold the only copy of what the dead one mirrored, and can hand it over only in a change that nobody's death forces.
    O(members).
    """
    generation, campaign, rules = state.generation, state.campaign, state.rules
    assert generation is not None and campaign is not None and campaign.leader_since_s is not None
    if generation.why == FINISHED:
        return None  # the last one: what is left to do is to tell it
    leader_since_s = campaign.leader_since_s
    peers = dict(state.peers)
    evict_s = rules.evict_s
    evicted = (
        ()
        if leader_since_s + evict_s > now
        else tuple(
            m.name
            for m in generation.members
            if m.name != state.name and (m.name not in peers or peers[m.name].heard_s + evict_s <= now)
        )
    )
    rehost = generation.host != state.name
    if (
        rehost
        and now < leader_since_s + rules.evict_s
        and any(
            m.name != state.name and (m.name not in peers or peers[m.name].heard_s < leader_since_s)
            for m in generation.members
        )
    ):
        return None  # Who is silent may be alive and hold a lease: [Note: leases].

    finished = [name for name, peer in state.peers if peer.record.finished] + [state.name] * own.finished
    evens_out = now >= state.even_out_at_s and generation.running
    if not (evicted or rehost or finished or len(state.restless) or evens_out or differs(generation, own)):
        return None  # as nearly always; what follows is dearer

    records = [own, *(peers[name].record for name, _ in state.restless if name in peers)]
    members = [r for r in records if r.name in generation.member and r.name not in evicted]
    departing = {r.name for r in members if r.departing} if rules.replicas == 1 or now >= state.let_go_at_s else set()
    left = tuple(r.name for r in members if r.name in departing or _disowned(generation, r))
    gone, drained, joined = [], [], []
    for r in members:
        before = generation.member[r.name].workers
        gone += [w for w in before if w not in r.workers]
        drained += [w for w in before if w in r.workers and (w in r.leaving or r.name in departing)]
        if r.name not in left and (new := tuple(w for w in r.workers if w not in before and w not in r.leaving)):
            joined.append(Member(r.name, r.address, new))
    if gone or any(generation.member[name].workers for name in evicted):
        drained = []
        left = tuple(name for name in left if not {*generation.member[name].workers}.difference(gone))
    staying = [m for m in generation.members if m.name not in evicted and m.name not in left]
    room = rules.max_nodes - len(staying)
    waiting = [
        r
        for r in records
        if r.name not in generation.member and differs(generation, r) and peers[r.name].heard_s + rules.lease_s > now
    ]
    joined += [Member(r.name, r.address, r.workers) for r in waiting[: max(0, room)]]

    lost = {*gone, *drained}
    growing = {m.name for m in joined}
    working = sum(m.name in growing or any(w not in lost for w in m.workers) for m in staying)
    working += sum(m.name not in generation.member for m in joined)
    goes_on = any(w not in lost for m in staying for w in m.workers)
    # Who begins, or begins again, fills each replica, so that all of them begin alike.
    running = working >= rules.min_nodes and (goes_on or sum(len(m.workers) for m in joined) >= rules.replicas)
    if any(name in generation.member and generation.member[name].workers for name in finished):
        # Its workers have passed the job's last barrier, and so have all; a newcomer since then has nothing to do.
        return Change(FINISHED, state.name, campaign.ballot.round, running=False)
    host = state.name
    if state.name in left:
        host = next((m.name for m in staying), "")
    full = len(staying) + sum(m.name not in generation.member for m in joined) >= rules.max_nodes
    joins = joined and (running or generation.running) and (joins_due(state, now) or full)
    broke = [r for r in members if r.broken == generation.number]
    if not host or not (evicted or left or gone or drained or rehost or joins or broke or evens_out):
        return None
    otherwise = "a collective broke" if broke else "workers move to smaller replicas"
    return Change(
        why=_why(evicted, left, gone, drained, rehost, joined) or otherwise,
        host=host,
        term=campaign.ballot.round,
        running=running,
        evicted=evicted,
        left=left,
        gone=tuple(gone),
        drained=tuple(drained),
        joined=tuple(joined),
        broken=tuple(sorted({replica for r in broke for replica in r.broken_in})),
    )


def _why(evicted, left, gone, drained, rehost, joined) -> str:
    """One clause a kind of change, the first few names of each."""
    said = [
        f"{verb} {', '.join(names[:3])}{' …' if len(names) > 3 else ''}"
        for verb, names in (
            ("silent:", evicted),
            ("leaving:", left),
            ("died:", gone),
            ("drained:", drained),
            ("joined:", [m.name for m in joined]),
        )
        if names
    ]
    return "; ".join([*said, *(["the host was lost"] if rehost else [])])
