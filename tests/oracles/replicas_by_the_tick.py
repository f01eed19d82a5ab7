"""Replicas that step apart and meet, each of them followed tick by tick: what the simulation of many must agree with.

A clock of whole ticks, a state for each replica, and the words of elastic_lsopt/backends/peers/meeting.py: who is
waited for, how long, and that an exchange in which one is lost fails for all.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field


@dataclass
class Replica:
    """`doing` is stepping, waiting (it has said that it is there), exchanging or away."""

    steps: int
    """A round's."""
    step: int
    """Ticks of a step."""
    doing: str = "stepping"
    since: int = 0
    taken: int = 0
    """Steps that no exchange has counted."""
    back: int = 0
    knows: bool = True
    """It has the model; one that has come back has not."""


@dataclass
class Job:
    replicas: list[Replica]
    exchange: int
    timeout: int
    notice: float
    restart: int
    now: int = 0
    counted: int = 0
    lost: int = 0
    away: int = 0
    """Ticks of single replicas."""
    gone: dict[int, float] = field(default_factory=dict)
    """When the others know of those who were lost since the last decision."""
    expected: set[int] = field(default_factory=set)
    members: set[int] = field(default_factory=set)
    ends: float = math.inf
    """Of the exchange under way."""
    limit: float = math.inf
    meetings: list[int] = field(default_factory=list)


def follow(job: Job, outages: list[tuple[int, int, int]], end: int) -> Job:
    """Until the first meeting that ends at `end` or later; outages are (replica, down, up)."""
    job.expected = set(range(len(job.replicas)))
    todo = sorted(outages, key=lambda o: o[1])
    while True:
        while todo and todo[0][1] == job.now:
            _lose(job, *todo.pop(0))
        for r in job.replicas:
            if r.doing == "away" and r.back <= job.now:
                r.doing, r.since = "waiting", r.back
            elif r.doing == "stepping" and job.now - r.since >= r.steps * r.step:
                r.doing, r.taken = "waiting", r.taken + r.steps
                r.since = job.now
        if job.ends < math.inf and job.now >= job.ends:
            _end(job)
            if job.now >= end:
                return job
        elif job.ends == math.inf:
            if not any(r.knows for r in job.replicas):
                _begin_again(job)
            _decide(job)
            if job.ends <= job.now:
                continue
        job.now += 1
        job.away += sum(not r.knows for r in job.replicas)


def _lose(job: Job, number: int, down: int, up: int) -> None:
    r = job.replicas[number]
    r.back = max(r.back, up + job.restart)
    if r.doing == "dead there":
        return
    if not r.knows and r.doing != "exchanging":
        r.doing = "away"
        return
    job.lost += r.taken + (min(r.steps, (down - r.since) // r.step) if r.doing == "stepping" else 0)
    job.gone[number] = down + job.notice
    if r.doing == "exchanging":
        job.ends = max(down, min(max(job.gone[m] for m in job.members if m in job.gone), job.limit))
    there = r.doing == "waiting" and job.ends == math.inf
    r.doing, r.taken, r.knows = ("dead there" if there else "away"), 0, False


def _begin_again(job: Job) -> None:
    """All were lost: the first that is back begins from a checkpoint."""
    job.expected = {n for n, r in enumerate(job.replicas) if r.doing == "waiting"}
    for n in job.expected:
        job.replicas[n].doing, job.replicas[n].since, job.replicas[n].knows = "stepping", job.now, True
    job.gone = {}


def _decide(job: Job) -> None:
    there = {n for n, r in enumerate(job.replicas) if r.doing in ("waiting", "dead there")}
    hurried = [job.replicas[n].since for n in there if job.replicas[n].knows and n in job.expected]
    if not any(job.replicas[n].knows for n in there) or not hurried:
        return
    first = min(hurried)
    # Who had said so and was lost is not waited for, but the exchange with it will fail.
    seen = all(n in there or job.gone.get(n, math.inf) <= job.now for n in job.expected)
    if not seen and job.now < first + job.timeout / 2:
        return
    job.members, job.limit = there, first + job.timeout
    broken = [n for n in there if job.replicas[n].doing == "dead there"]
    job.ends = job.now + (job.exchange if len(there) > 1 else 0)
    if broken:
        job.ends = max(job.now, min(max(job.gone[n] for n in broken), job.limit))
    for n in there - {*broken}:
        job.replicas[n].doing = "exchanging"
    for n in broken:
        job.replicas[n].doing = "away"


def _end(job: Job) -> None:
    well = all(job.replicas[n].doing == "exchanging" for n in job.members)
    for n in job.members:
        r = job.replicas[n]
        if r.doing != "exchanging":
            continue
        if well:
            job.counted, r.taken, r.knows = job.counted + r.taken, 0, True
        r.doing, r.since = ("stepping" if r.knows else "waiting"), job.now
    job.expected = {n for n in job.members if job.replicas[n].doing == "stepping"}
    job.gone, job.ends = {}, math.inf
    job.meetings.append(job.now)
