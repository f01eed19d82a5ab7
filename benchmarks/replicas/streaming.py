"""How much of an exchange's time is hidden where a fragment is exchanged while steps go on.

Two replicas of 10.2M parameters, each on a host of its own, with a link of 200 Mbit/s: a fragment of a quarter takes
0.43 s. Three engines on one backend take turns in blocks of eight steps, with an exchange of a fragment before each
second one: streaming DiLoCo, the same with no step beside the exchange (overlap 0), and plain steps that wait for the
other replica in the same places. Hidden is what of the time that exchanges add with overlap 0 they do not add with
overlap 1.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import elastic_lsopt as lso
from benchmarks.models import Size, beside, engine, units
from benchmarks.replicas.job import STORE, Job, Place
from benchmarks.replicas.network import Links

SIZE = Size(384, 4, 1024, 6, 4096, 256, 4)
FRAGMENTS, EVERY, STEPS, MBIT = 4, 2, 8, 200.0
BLOCKS, LIMIT_S = 7, 1500.0


def replica(place: Place, *, size: dict[str, Any], blocks: int) -> None:
    place.form()
    shape = Size(**size)
    batch = units(shape, 1)
    plain = engine("plain", shape, lso.Plain())
    more: dict[str, Any] = {"tau": EVERY * FRAGMENTS, "fragments": FRAGMENTS}
    rules = {
        name: place.consensus(name, "streaming_diloco", overlap=overlap, **more)
        for name, overlap in (("streamed", 1), ("blocking", 0))
    }
    engines = {name: beside(plain, lso.Plain(), consensus=rule) for name, rule in rules.items()}

    def steps(made: lso.Engine, name: str, turn: int) -> None:
        for step in range(STEPS):
            if made is plain and step % EVERY == 0:
                place.meet(f"{name}/{turn}/{step}")
            made.train_batch(batch)

    works: dict[str, Callable[[str, int], None]] = {
        "plain": lambda name, turn: steps(plain, name, turn),
        **{name: lambda name, turn, made=made: steps(made, name, turn) for name, made in engines.items()},
    }
    for turn in range(-1, blocks):
        for name in [*works][:: 1 if turn % 2 else -1]:
            place.meet(f"{name}/{turn} begins")
            begin, before = time.perf_counter(), len(rules[name].exchanges) if name in rules else 0
            works[name](name, turn)
            if name in rules:
                rules[name].settled()  # the last one ends in this block too
            spent = time.perf_counter() - begin
            met = rules[name].exchanges[before:] if name in rules else []
            assert all(m.well and len(m.members) == len(place.sizes) for m in met), met
            place.say(name=name, turn=turn, seconds=spent, each=[m.seconds for m in met])


def measure(*, blocks: int = BLOCKS, size: Size = SIZE, mbit: float = MBIT) -> dict[str, Any]:
    if missing := Links.missing():
        return {"unproved": missing}
    with Links(["r0", "r1", STORE], mbit) as network, Job(
        "benchmarks.replicas.streaming:replica", [1, 1], network=network, hosts=["r0", "r1"],
        size=asdict(size), blocks=blocks,
    ) as job:  # fmt: skip
        said = job.end(LIMIT_S)
    times = {
        name: [
            statistics.mean(line["seconds"] for lines in said for line in lines if (line["name"], line["turn"]) == at)
            for at in ((name, turn) for turn in range(blocks))
        ]
        for name in ("plain", "streamed", "blocking")
    }
    hidden = [
        (blocking - streamed) / (blocking - plain)
        for plain, streamed, blocking in zip(*(times[n] for n in ("plain", "streamed", "blocking")), strict=True)
    ]
    medians = {f"{name}_step_s": statistics.median(t) / STEPS for name, t in times.items()}
    low, _, high = statistics.quantiles(hidden, n=4, method="inclusive")
    each = [s for lines in said for line in lines if line["turn"] >= 0 for s in line["each"]]
    return {
        "hidden_share": statistics.median(hidden), "hidden_share_spread": [low, high],
        "exchange_s": (medians["blocking_step_s"] - medians["plain_step_s"]) * EVERY,
        "longest_exchange_s": max(each), **medians, "mbit": mbit,
    }  # fmt: skip


def run() -> dict[str, Any]:
    return measure()
