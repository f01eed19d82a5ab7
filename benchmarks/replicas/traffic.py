"""What leaves a host in an exchange, counted on the wire, beside what the rule's paper sends; and how many collectives.

Four replicas of 10.2M parameters, each on a host of its own (a network namespace), meet after each step. Counted are
the bytes that leave by the hosts' own links, headers and the talk with the job's store included, over four exchanges.
The paper's, for all R replicas together, of P numbers of b bits:

    a mean or a sum       2 (R - 1) P b / 8        an all-reduce
    lsgd                  (R - 1) P b / 8          from the leader
    al_dsgd               2 P b / 8 per edge of the exchange's graph
    sparseloco            R (R - 1) P k / 4096 (12 + b) / 8        places in chunks of 4096, and values, to all

A sum in two halves (an all-to-all, an all-gather) is one collective. `sharded`: two replicas of two ranks, FSDP2.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist

import elastic_lsopt as lso
from benchmarks.models import Size, engine, momentum, units
from benchmarks.replicas.job import STORE, Job, Line, Place
from benchmarks.replicas.network import Links, sent_bytes
from elastic_lsopt.consensus.al_dsgd import active
from elastic_lsopt.updates.update_optimizer import UpdateOptimizer

SIZE = Size(384, 4, 1024, 6, 4096, 32, 1)
WARM, COUNTED = 4, 4
"""Exchanges; the first ones make the groups."""
LIMIT_S = 1500.0
VECTOR_BYTES = 2**16
"""Less is a number to all, not a collective over the parameters."""
REPLICAS, SHARDED = [1, 1, 1, 1], [2, 2]
K, CHUNK, PLACE_BITS, FRAGMENTS = 64, 4096, 12, 4
Case = tuple[str, dict[str, Any]]
CASES: dict[str, Case] = {
    **{rule: (rule, {}) for rule in (
        "local_sgd", "easgd", "eamsgd", "lsam", "parle", "mgrawa", "lgrawa", "dppf", "diloco", "muloco", "lsgd",
        "al_dsgd",
    )},
    "streaming_diloco": ("streaming_diloco", {"tau": FRAGMENTS, "fragments": FRAGMENTS, "overlap": 0}),
    **{f"diloco_{bits}_bits": ("diloco", {"bits": bits}) for bits in (16, 8, 4, 2)},
    "local_sgd_2_bits": ("local_sgd", {"bits": 2}),
    "sparseloco": ("sparseloco", {"bits": 2, "top_k": K}),
}  # fmt: skip
IN_SHARDS = ("local_sgd", "lsgd", "diloco_4_bits")
NAMES = (*CASES, *(f"sharded_{case}" for case in IN_SHARDS))
"""Of figures, without what they are about."""
CALLS = ("alltoall_base", "_allgather_base", "allgather", "allreduce", "broadcast", "send", "recv")
METHODS: dict[str, Callable[[], Any]] = {
    "lsam": lambda: lso.SAM(rho=0.05), "parle": lambda: lso.registry.build("entropy_sgd", inner_steps=1),
}  # fmt: skip


def muon(parameters: Any) -> UpdateOptimizer:
    matrices, others = ([p for p in parameters if (p.ndim == 2) is so] for so in (True, False))
    return UpdateOptimizer([{"params": matrices, "update": "muon"}, {"params": others}], "SGD", lr=1e-3)


class Calls:
    """Which calls of groups there were, by name, with tensors of so many bytes and more. A context manager."""

    def __init__(self) -> None:
        self.made: Counter[str] = Counter()

    def __enter__(self) -> Calls:
        self._before = {name: vars(dist.ProcessGroup)[name] for name in CALLS}
        for name in CALLS:
            setattr(dist.ProcessGroup, name, self._counting(name, getattr(dist.ProcessGroup, name)))
        return self

    def __exit__(self, *_: object) -> None:
        for name, inner in self._before.items():
            setattr(dist.ProcessGroup, name, inner)

    def _counting(self, name: str, inner: Callable[..., Any]) -> Callable[..., Any]:
        def outer(group: Any, *arguments: Any, **more: Any) -> Any:
            tensors = [t for a in arguments for t in (a if isinstance(a, list) else [a]) if isinstance(t, torch.Tensor)]
            if any(t.nbytes >= VECTOR_BYTES for t in tensors):
                self.made[name] += 1
            return inner(group, *arguments, **more)

        return outer


def collectives(calls: Counter[str]) -> int:
    """Of calls, the two halves of a sum for one."""
    halves = max(calls["alltoall_base"], calls["_allgather_base"])
    return halves + sum(calls[name] for name in CALLS if name not in ("alltoall_base", "_allgather_base"))


def replica(place: Place, *, kind: str, cases: list[str], size: dict[str, Any]) -> None:
    """All cases, one after another, each with a model of its own."""
    place.form()
    shape = Size(**size)
    batch = units(shape, 1)
    for case in cases:
        rule, more = CASES[case]
        method = METHODS.get(rule, lso.Plain)()
        consensus = place.consensus(case, rule, **{"tau": 1, **more})
        base = muon if rule == "muloco" else momentum
        made = engine(kind, shape, method, base=base, consensus=consensus)
        for _ in range(1 + WARM):
            made.train_batch(batch)
        place.meet(f"{case} begins")
        with Calls() as calls:
            wire = sent_bytes() if place.own == 0 and place.hosted else 0
            place.meet(f"{case} is read")
            exchange_only = Counter[str]()
            for _ in range(COUNTED):
                met = _counted(consensus, made, batch, calls, exchange_only)
                assert met.well and len(met.members) == len(place.sizes), met
            place.meet(f"{case} ends")
            wire = sent_bytes() - wire if place.own == 0 and place.hosted else 0
        place.say(
            case=case, wire=wire, own=sum(e.sent_bytes for e in consensus.exchanges[-COUNTED:]), calls=exchange_only,
            numel=sum(p.numel for p in made.space.layout.parameters),
        )  # fmt: skip
        place.meet(f"{case} is over")


def _counted(consensus: Any, made: lso.Engine, batch: Any, calls: Calls, of_exchange: Counter[str]) -> Any:
    """A step with the exchange before it; the step's own calls are left out."""
    inner = consensus.exchange

    def exchange(*arguments: Any, **more: Any) -> Any:
        calls.made.clear()
        met = inner(*arguments, **more)
        of_exchange.update(calls.made)
        return met

    consensus.exchange = exchange
    try:
        made.train_batch(batch)
    finally:
        del consensus.exchange
    return consensus.exchanges[-1]


def papers(case: str, numel: int, replicas: int) -> float:
    """Bytes that all replicas send in COUNTED exchanges, as the paper's algorithm does."""
    rule, more = CASES[case]
    bits = more.get("bits", 32)
    if rule == "lsgd":
        return COUNTED * (replicas - 1) * numel * bits / 8
    if rule == "al_dsgd":
        edges = sum(len(active("ring", replicas, 0.5, number)) for number in range(WARM, WARM + COUNTED))
        return edges * 2 * numel * bits / 8
    if rule == "sparseloco":
        return COUNTED * replicas * (replicas - 1) * numel * K / CHUNK * (PLACE_BITS + bits) / 8
    return COUNTED * 2 * (replicas - 1) * numel * bits / 8 / more.get("fragments", 1)


def measure(sizes: list[int], kind: str, cases: list[str], *, prefix: str = "", size: Size = SIZE) -> dict[str, Any]:
    """Figures of these cases. Without network namespaces the bytes are those that we count ourselves."""
    hosts = [f"r{number}" for number in range(len(sizes))]
    arguments = {"kind": kind, "cases": cases, "size": asdict(size)}
    if (missing := Links.missing()) is None:
        with Links([*hosts, STORE]) as network, Job(
            "benchmarks.replicas.traffic:replica", sizes, network=network, hosts=hosts, **arguments
        ) as job:  # fmt: skip
            said = job.end(LIMIT_S)
    else:
        with Job("benchmarks.replicas.traffic:replica", sizes, **arguments) as job:
            said = job.end(LIMIT_S)
    figures: dict[str, Any] = {f"{prefix}wire_unproved": missing} if missing else {}
    for lines in zip(*said, strict=True):
        figures |= _figures(lines, len(sizes), prefix)
    return figures


def _figures(lines: tuple[Line, ...], replicas: int, prefix: str) -> dict[str, Any]:
    case = lines[0]["case"]
    wanted = papers(case, lines[0]["numel"], replicas)
    name, calls = f"{prefix}{case}", [Counter(line["calls"]) for line in lines]
    own, wire = (sum(line[what] for line in lines) for what in ("own", "wire"))
    return {
        **({f"{name}_wire_of_paper": wire / wanted} if wire else {}),
        f"{name}_counted_of_paper": own / wanted,
        f"{name}_bytes_per_exchange": (wire or own) / COUNTED,
        f"{name}_collectives": max(map(collectives, calls)) / COUNTED,
        f"{name}_calls": {key: value / COUNTED for key, value in calls[0].items()},
    }


def run() -> dict[str, Any]:
    figures = measure(REPLICAS, "plain", [*CASES])
    return figures | measure(SHARDED, "fsdp2", [*IN_SHARDS], prefix="sharded_")
