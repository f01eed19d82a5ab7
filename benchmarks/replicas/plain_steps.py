"""What a step between two exchanges costs beside a plain step of the same ranks.

Replica 0 has two ranks, replica 1 has one, which meets the other once and then sleeps; so the groups of the exchange
are there. Then steps with and without consensus take turns on replica 0, on one backend, and no exchange is due.
`idle_groups_of_core` is what the processor does for a rank that sleeps, after that exchange less before it: the cost
of groups that both kinds of steps bear in these turns, and only one of them in a job.
"""

from __future__ import annotations

import time
from typing import Any

import torch.distributed as dist

import elastic_lsopt as lso
from benchmarks.models import SIZES, beside, engine, units
from benchmarks.replicas.job import Job, Place
from benchmarks.timing import ratio_of, rounds

KINDS = ("ddp", "fsdp2", "zero2", "zero3")
RULES: dict[str, dict[str, Any]] = {"local_sgd": {}, "lsgd": {}, "mgrawa": {"norms": "training"}}
"""The first does nothing in a step; the others are those that do most: a pull, and a norm of each parameter."""
SIZES_OF_REPLICAS = [2, 1]
NEVER, IDLE_S, LIMIT_S = 10**6, 3.0, 1500.0


def replica(place: Place, *, kind: str, size: str, pairs: int, rules: list[str]) -> None:
    place.form()
    batch = units(SIZES[size], 1)
    plain = engine(kind, SIZES[size], lso.Plain())
    plain.train_batch(batch)
    alone = idle_share()
    drifting: dict[str, lso.Engine] = {}
    for rule in rules:
        consensus = place.consensus(rule, rule, tau=NEVER, **RULES[rule])
        made = drifting[rule] = beside(plain, lso.Plain(), consensus=consensus)
        made.train_batch(batch)  # a leader's rule wants a loss
        met = consensus.exchange(made.oracle([batch[0]]))
        assert met is not None and met.well and met.members == (0, 1), met
        if rule == rules[0]:
            groups = idle_share()
    if place.number == 0:
        works: Any = {rule: lambda made=made: made.train_batch(batch) for rule, made in drifting.items()}
        times = rounds(pairs, base=lambda: plain.train_batch(batch), **works)
        for rule in rules:
            place.say(figures=ratio_of(times[rule], times["base"]).figures(f"{rule}_{kind}_of_plain_step"))
        place.say(figures={f"idle_groups_of_core_{kind}": groups - alone})
        if place.own == 0:
            place.store.set("measured", "")
    else:
        place.store.wait(["measured"], dist.default_pg_timeout)


def idle_share() -> float:
    """Of a core, for a rank that sleeps."""
    begin = time.process_time()
    time.sleep(IDLE_S)
    return (time.process_time() - begin) / IDLE_S


def measure(
    kind: str, *, size: str = "cpu", pairs: int | None = None, rules: list[str] | None = None
) -> dict[str, Any]:
    with Job(
        "benchmarks.replicas.plain_steps:replica", SIZES_OF_REPLICAS, kind=kind, size=size,
        pairs=pairs or SIZES[size].pairs, rules=rules or [*RULES],
    ) as job:  # fmt: skip
        said = job.end(LIMIT_S)
    return {name: value for line in said[0] for name, value in line["figures"].items()}


def run() -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for kind in KINDS:
        figures |= measure(kind, pairs=15)
    return figures
