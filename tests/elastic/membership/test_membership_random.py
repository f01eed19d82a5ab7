"""Random histories: crashes, restarts, partitions, loss, delay, skewed clocks; then the network heals.

The workers of the model's nodes train meanwhile, each at its own pace (commit_rule.py).
"""

from __future__ import annotations

from dataclasses import replace
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from elastic_lsopt.elastic.membership import machine as membership
from elastic_lsopt.elastic.membership.record import Broken, DrainWorker, Rules, Unreachable
from tests.elastic.membership.commit_rule import Job
from tests.elastic.membership.model import Place, World, begin

pytestmark = pytest.mark.fast

LEASE_S = 8.0
ACTIONS = (
    "time", "time", "time", "read", "read", "read", "read all", "read all", "stale", "crash", "restart", "kill",
    "spawn", "cut", "mend", "drain", "refused", "broken", "fill",
)  # fmt: skip
acts = st.lists(st.tuples(st.sampled_from(ACTIONS), st.integers(0, 2**16)), min_size=10, max_size=120)


def rules(**more: Any) -> Rules:
    return Rules(**{"min_nodes": 1, "max_nodes": 6, "job": "j", "fingerprint": {}, "lease_s": LEASE_S, **more})


def broken_at(place: Place, chance: int) -> Broken:
    """A collective broke there: in a job of several replicas one of the groups that the agent knows."""
    assert place.state is not None
    generation = place.state.generation
    if generation is None or not generation.replicas:
        return Broken(place.state.number)
    replica = chance // 3 % len(generation.replicas)
    return Broken(generation.replicas[replica].since, replica)


def follow(job: Job, world: World) -> Job:
    """The workers that the agents keep alive, each in the generation that its agent has told it of."""
    job = job.living(worker for p in world.places for worker in p.alive)
    decided = {g.number: g for g in world.decided}
    for p in world.places:
        for worker in sorted(p.alive) if p.state and p.entered else ():
            generation = decided[p.entered]
            ranks = tuple(name for _, name in generation.ranks)
            job = job.enter(worker, generation.number, ranks, running=generation.running)
    return job


def work(job: Job, chance: int) -> Job:
    """A few things that workers do, in any order."""
    random = Random(chance)
    for _ in range(random.choice((0, 1, 4, 16)) if job.trainers else 0):
        name = random.choice(job.trainers).name
        job = job.push(name) if random.random() < 0.3 else job.act(name)
    return job


def play(world: World, history: list[tuple[str, int]], rates: list[float]) -> tuple[World, Job]:
    """Let it all happen; what a cut link carries lies there until the link is mended."""
    places = tuple(replace(p, rate=rate) for p, rate in zip(world.places, rates, strict=False))
    world = replace(world, places=places)
    names = [p.name for p in places]
    cut: set[tuple[str, str]] = set()
    job = Job()
    for action, chance in history:
        name = names[chance % len(names)]
        place = world.place(name)
        readable = [(link, records) for link, records in world.mail if link not in cut]
        if action == "time":
            world = world.tick((0.5, 0.5, 1.0, 1.0)[chance % 4])
            if chance % 3:
                for (writer, reader), records in world.mail:
                    if (writer, reader) not in cut:
                        world = world.deliver(writer, reader, len(records) - 1)
        elif action in ("read", "stale") and readable:
            (writer, reader), records = readable[chance % len(readable)]
            world = world.deliver(writer, reader, 0 if action == "stale" else len(records) - 1)
        elif action == "read all" and readable:
            reader = readable[chance % len(readable)][0][1]
            writers = [w for (w, r), _ in readable if r == reader]
            Random(chance).shuffle(writers)
            world = world.deliver_newest(tuple(writers), reader)
        elif action == "crash" and place.state:
            world = world.crash(name)
        elif action == "restart" and place.state is None and place.disk:
            world = world.restart(name)
        elif action == "kill" and place.state and place.alive:
            world = world.kill_worker(name)
        elif action == "spawn" and place.state and not place.alive and not place.state.ended:
            world = world.spawn(name)
        elif action == "drain" and place.state and place.alive and place.entered:
            newest = world.decided[-1]
            for worker in sorted(place.alive.intersection(w for _, w in newest.ranks))[:1]:
                world = world.give(name, DrainWorker(worker))
        elif action == "refused" and place.state:
            world = world.give(name, Unreachable(names[chance // 7 % len(names)]))
        elif action == "broken" and place.state:
            world = world.give(name, broken_at(place, chance))
        elif action == "fill":  # one node's disk, every node's, or none's any more
            world = world.fill(*(names if chance % 5 == 0 else [name] if chance % 5 < 3 else []))
        elif action == "cut":
            other = names[chance // 11 % len(names)]
            cut |= {(name, other)} if chance % 2 else {(name, other), (other, name)}
        elif action == "mend":
            cut = set() if chance % 2 else set(list(cut)[: len(cut) // 2])
        job = work(follow(job, world), chance)
    return world, job


@pytest.mark.long
@settings(max_examples=60, suppress_health_check=list(HealthCheck), phases=(Phase.explicit, Phase.generate))
@given(
    count=st.integers(1, 5),
    spares=st.integers(0, 1),
    witness=st.booleans(),
    replicas=st.sampled_from((1, 1, 2)),
    history=acts,
    rates=st.lists(st.floats(0.9, 1.1), min_size=6, max_size=6),
)
def test_safe_always_and_settled_when_healed(
    count: int, spares: int, witness: bool, replicas: int, history: list[tuple[str, int]], rates: list[float]
) -> None:
    """One generation a number, entered in order; nobody lost is alive (World._decide); the commit rule holds (Job).

    Healed, with every agent of the newest generation back, the living ones are the agreed world within 10 leases.
    """
    replicas = min(replicas, count)
    start = begin(count, rules(witness="etcd" if witness else None, replicas=replicas), spares=spares)
    for name in [p.name for p in start.places][count:]:
        start = start.spawn(name)
    world, job = play(start, history, rates)
    world = world.fill()
    for place in world.places:
        if place.state is None and place.disk:
            world = world.restart(place.name)
    for i in range(20):
        world = world.run(LEASE_S / 2)
        job = work(follow(job, world), i)
    for name in [t.name for t in job.trainers] * 16:
        job = job.act(name).push(name)
    assert job.committed[0] == world.decided[-1].number, "all take part, and steps are committed"
    assert world.settled(), (world.decided[-1], [(p.name, p.state and p.state.number, p.alive) for p in world.places])


@pytest.mark.long
@settings(max_examples=60, suppress_health_check=list(HealthCheck), phases=(Phase.explicit, Phase.generate))
@given(count=st.integers(2, 5), dead=st.sets(st.integers(0, 4), min_size=1, max_size=2), witness=st.booleans())
def test_a_quorum_goes_on_without_the_dead(count: int, dead: set[int], witness: bool) -> None:
    """Within 4 leases, and the survivors' workers live on: nothing that they hold is lost."""
    world = begin(count, rules(witness="etcd" if witness else None))
    names = [p.name for p in world.places]
    lost = [names[i] for i in dead if i < count]
    alive = count - len(lost)
    quorum = 2 * alive > count or (2 * alive == count and (witness or "a" not in lost))
    before = {p.name: p.alive for p in world.places}
    for name in lost:
        world = world.crash(name)
    world = world.run(4 * LEASE_S, respawn=False)
    if quorum and lost:
        assert {m.name for m in world.decided[-1].members} == {*names} - {*lost}
        assert all(p.alive == before[p.name] for p in world.places if p.name not in lost)
    elif lost:
        assert len(world.decided[-1].members) == count
        assert not any(p.alive for p in world.places), "a minority's workers must end"


def test_the_clock_margin_is_as_stated() -> None:
    """1.5 leases on the slowest clock end before 2 leases on the fastest one do: [Note: leases]."""
    assert 1.5 / 0.9 < 2 / 1.1
    assert membership.__doc__ and "0.15 lease_s" in membership.__doc__
    assert pytest.approx(0.15, abs=0.01) == 2 / 1.1 - 1.5 / 0.9
