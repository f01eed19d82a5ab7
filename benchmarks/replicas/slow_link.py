"""Four replicas beside synchronous data parallelism, over links of 200 Mbit/s; and what one that hangs costs.

Four processes of 10.2M parameters, each on a host of its own. `replicas`: local SGD that meets each 16 steps.
`synchronous`: torch's DistributedDataParallel, which sends gradients while it computes others. Jobs of both take turns
(A B B A …). Throughput is samples per second over whole rounds of 16 steps, exchanges included. The global batch is
eight sequences of 256 tokens: the more a replica computes per step, the less its link matters.

A replica hangs: it is stopped for three deadlines, in a job that meets each second step. The others' steps with an
exchange before them are compared with their usual ones.
"""

from __future__ import annotations

import os
import signal
import statistics
import time
from dataclasses import asdict
from typing import Any

from torch import nn

import elastic_lsopt as lso
from benchmarks.models import LOSS, Size, engine, llama, momentum, units
from benchmarks.replicas.job import STORE, Job, Line, Place
from benchmarks.replicas.network import Links, sent_bytes

SIZE = Size(384, 4, 1024, 6, 4096, 256, 2)
TAU, MBIT, REPLICAS = 16, 200.0, 4
ROUNDS, PAIRS = 1, 3
DEADLINE_S, LIMIT_S = 10.0, 1500.0
HANGS_IN_ROUND, HANGS_TAU = 2, 2


def replicas(
    place: Place, *, size: dict[str, Any], rounds: int, tau: int = TAU, hangs: int = -1, deadline_s: float = DEADLINE_S
) -> None:
    """Rounds of an exchange and TAU steps; groups are made before the first."""
    place.form()
    shape = Size(**size)
    batch = units(shape, 1)
    consensus = place.consensus("slow", "local_sgd", tau=tau, timeout_s=deadline_s)
    made = engine("plain", shape, lso.Plain(), consensus=consensus)
    made.train_batch(batch)
    consensus.exchange(made.oracle(batch))
    for _ in range(tau):
        made.train_batch(batch)
    place.meet("ready")
    for number in range(rounds):
        steps, begin, sent = list[float](), time.perf_counter(), sent_bytes()
        if number == HANGS_IN_ROUND and place.number == hangs:
            os.kill(os.getpid(), signal.SIGSTOP)
        for _ in range(tau):  # an exchange is due before the first
            at = time.perf_counter()
            made.train_batch(batch)
            steps.append(time.perf_counter() - at)
        met = consensus.exchanges[-1]
        place.say(
            seconds=time.perf_counter() - begin, steps=steps, sent=sent_bytes() - sent, members=met.members,
            well=met.well, exchange_s=met.seconds,
        )  # fmt: skip


def synchronous(place: Place, *, size: dict[str, Any], rounds: int) -> None:
    """torch's own, as its users write it."""
    place.one_world()
    shape = Size(**size)
    batch = units(shape, 1)[0]
    model = nn.parallel.DistributedDataParallel(llama(shape))
    base = momentum(model.parameters())

    def step() -> None:
        base.zero_grad()
        logits = LOSS.forward(model, batch)
        LOSS.criterion(logits, batch).backward()
        base.step()

    for _ in range(2):
        step()
    place.meet("ready")
    for _ in range(rounds):
        steps, begin, sent = list[float](), time.perf_counter(), sent_bytes()
        for _ in range(TAU):
            at = time.perf_counter()
            step()
            steps.append(time.perf_counter() - at)
        place.say(seconds=time.perf_counter() - begin, steps=steps, sent=sent_bytes() - sent)


def job(what: str, size: Size, rounds: int, mbit: float = MBIT, **more: Any) -> list[list[Line]]:
    hosts = [f"r{number}" for number in range(REPLICAS)]
    with Links([*hosts, STORE], mbit) as network, Job(
        f"benchmarks.replicas.slow_link:{what}", [1] * REPLICAS, network=network, hosts=hosts,
        size=asdict(size), rounds=rounds, **more,
    ) as running:  # fmt: skip
        if "hangs" in more:
            running.stop_and_wake(more["hangs"], 3 * more.get("deadline_s", DEADLINE_S), LIMIT_S)
        return running.end(LIMIT_S)


def of_round(said: list[list[Line]], what: str) -> float:
    """The mean over rounds, of the rank where it is most."""
    return max(statistics.mean(line[what] for line in lines) for lines in said)


def beside(size: Size, *, rounds: int = ROUNDS, pairs: int = PAIRS, mbit: float = MBIT) -> dict[str, Any]:
    """Throughput of replicas over that of synchronous data parallelism, pair by pair."""
    times: dict[str, list[float]] = {"replicas": [], "synchronous": []}
    sent: dict[str, float] = {}
    for pair in range(pairs):
        for what in [*times][:: 1 if pair % 2 else -1]:
            said = job(what, size, rounds, mbit)
            times[what].append(of_round(said, "seconds"))
            sent[what] = of_round(said, "sent")
    ratios = [b / a for a, b in zip(times["replicas"], times["synchronous"], strict=True)]
    name = f"{size.samples * REPLICAS}_samples"
    return {
        f"{name}_throughput_of_synchronous": statistics.median(ratios),
        f"{name}_throughput_of_synchronous_spread": [min(ratios), max(ratios)],
        f"{name}_bytes_of_synchronous": sent["replicas"] / sent["synchronous"],
        f"{name}_replicas_step_s": statistics.median(times["replicas"]) / TAU,
        f"{name}_synchronous_step_s": statistics.median(times["synchronous"]) / TAU,
    }


def hang(size: Size, *, deadline_s: float = DEADLINE_S, mbit: float = MBIT, rounds: int = 9) -> dict[str, Any]:
    """What the others' steps took beyond their usual, where one replica was stopped for three deadlines."""
    said = job("replicas", size, rounds, mbit, tau=HANGS_TAU, hangs=REPLICAS - 1, deadline_s=deadline_s)
    firsts = [[line["steps"][0] for line in lines] for lines in said[:-1]]  # the steps with an exchange before them
    usual = statistics.median(s for f in firsts for s in f[:HANGS_IN_ROUND])
    beyond = [sorted((s - usual for s in f[HANGS_IN_ROUND:]), reverse=True) for f in firsts]
    cost, again = (max(b[i] for b in beyond) for i in (0, 1))
    return {
        "hang_cost_s": cost, "hang_cost_of_deadline": cost / deadline_s, "hang_again_of_deadline": again / deadline_s,
        "deadline_s": deadline_s, "usual_exchange_step_s": usual, "hang_members": [m["members"] for m in said[0]],
    }  # fmt: skip


def run() -> dict[str, Any]:
    if missing := Links.missing():
        return {"unproved": missing}
    return {"mbit": MBIT, "tau": TAU, **beside(SIZE), **hang(SIZE)}
