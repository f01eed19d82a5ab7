"""Replicas that drift and meet, each an engine on ranks of its own, against whole models in one process."""

from __future__ import annotations

import math
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

import elastic_lsopt as lso
from elastic_lsopt.api.replicas.consensus import Consensus
from elastic_lsopt.backends.groups import form_replicas
from elastic_lsopt.backends.rebuild import tear_down
from elastic_lsopt.consensus import registry
from tests.cases import engines, updates
from tests.cases.laws import DTYPES
from tests.cases.replicas import away, dealt, place_of, weights
from tests.oracles import consensus as oracle
from tests.oracles import paper_loops

STEPS = 8
PATIENT_S = 120.0
"""Of an exchange: on a busy machine a replica may begin half a minute later, and one that is left out drifts on."""
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "parle": (
        "entropy_sgd",
        engines.HYPERPARAMETERS["entropy_sgd"] | {"inner_steps": 2, "batch": "whole", "gamma1": 0.0},
    )
}
"""Of a rule that needs one; the others have SAM. The walk's own scoping goes by the job's samples, which the loop does
not know."""
SAM = ("sam", engines.HYPERPARAMETERS["sam"])
TOP_K = {"sparseloco": 40}
"""Of the one chunk that a rank's part of the model is."""
BASES = {"muloco": "muon"}
FRAGMENTS = [[range(1), range(105, 259)], [range(1, 105), range(259, 317)]]
"""Of `engines.net`, written out: `tiny` and `second`; `first`, `norm` and `last`."""
HYPERPARAMETERS: dict[str, dict[str, Any]] = {
    "local_sgd": {"pull": 0.7}, "easgd": {"beta": 0.8}, "dppf": {"pull": 0.3, "push": 0.05},
    "diloco": {"lr": 0.7, "momentum": 0.9}, "lsgd": {"pull": 0.3, "prox": 0.4, "window": 2},
    "mgrawa": {}, "lgrawa": {"pull": 0.6}, "eamsgd": {"beta": 0.8}, "lsam": {"beta": 0.5},
    "al_dsgd": {"graph": "ring", "c1": 0.2, "c2": 0.1, "p1": 0.2, "p2": 0.1}, "parle": {"rho0": 0.5, "rho1": 0.1},
    "muloco": {"lr": 0.9, "momentum": 0.8}, "sparseloco": {"lr": 0.8, "decay": 0.9},
    "streaming_diloco": {"lr": 0.4, "momentum": 0.9, "fragments": 2, "overlap": 1, "alpha": 0.4},
}  # fmt: skip


def halves(kind: str) -> list[list[int]] | None:
    """What of `engines.net`'s flat vector the two ranks of a replica hold, written out; None where both hold all."""
    shapes, whole = [(1,), (13, 7), (13,), (11, 13), (11,), (11,), (11,), (3, 11), (3,)], range(317)
    if kind in ("plain", "ddp", "zero0"):
        return None
    if kind in ("zero1", "zero2"):  # the flat vector, filled up to a multiple of four
        return [[*whole[:160]], [*whole[160:]]]
    first, at = list[int](), 0
    for rows, *columns in shapes:  # of each parameter: fsdp2 its first rows, zero3 its first elements
        count = rows * math.prod(columns)
        first += range(at, at + ((rows + 1) // 2 * math.prod(columns) if kind == "fsdp2" else (count + 1) // 2))
        at += count
    return [first, [i for i in whole if i not in first]]


def given(rule: str, replicas: int, hyper: dict[str, Any], kind: str) -> dict[str, Any]:
    """What the plain loop is told of a rule."""
    if rule == "streaming_diloco":
        return {**{k: v for k, v in hyper.items() if k != "overlap"}, "places": FRAGMENTS}
    if rule == "sparseloco":
        return {**hyper, "k": TOP_K["sparseloco"], "chunk": 4096, "places": halves(kind)}
    if rule != "al_dsgd":
        return hyper
    # The ring's matchings in turn, half of them in the mean: one is used at every other exchange, or 2, 1, 2, 1 of 3.
    rounds = {2: [[(0, 1)], []], 3: [[(0, 1), (0, 2)], [(1, 2)]]}[replicas]
    return {**hyper, "rounds": rounds}


def ours(rule: str) -> Any:
    return updates.ours(BASES[rule]) if rule in BASES else "momentum"


def theirs(rule: str, net: torch.nn.Module) -> torch.optim.Optimizer:
    if rule in BASES:
        return updates.theirs(BASES[rule], net)
    return engines.optimizer("momentum")(list(net.named_parameters()))


def drift(
    kind: str, sizes: list[int], rule: str, *, tau: int = 3, dtype: str = "fp64", more: dict[str, Any] | None = None,
    bits: int = 32,
) -> dict[str, Any]:  # fmt: skip
    """max |dw| of this rank's replica from the plain loop, after 8 steps with meetings before steps 3 and 6."""
    me, hyper = dist.get_rank(), {**HYPERPARAMETERS[rule], **(more or {})}
    number, own = place_of(me, sizes)
    steps = engines.batches(STEPS, 2 * sum(sizes), last=2, dtype=DTYPES[dtype])
    method, of_method = METHODS.get(rule, SAM)
    plain = [oracle.Replica(net, theirs(rule, net)) for net in (engines.net((), DTYPES[dtype]) for _ in sizes)]
    owns = [range(2 * sum(sizes[:r]), 2 * sum(sizes[: r + 1])) for r in range(len(sizes))]
    begins = [float(sum(x.double().sum() for step in steps for x, _ in step)), float(plain[0].x.double().sum())]
    overlap = hyper.get("overlap", 0)
    oracle.drifted(plain, steps, owns, rule, tau, given(rule, len(sizes), hyper, kind), method, of_method, overlap)
    with away() as fresh:
        store = fresh()
        form_replicas(dist.PrefixStore("groups", store), me, sizes, timedelta(seconds=30), apart=True)
        consensus = Consensus(
            registry.build(rule, tau=tau * hyper.get("fragments", 1), **hyper), dist.PrefixStore("consensus", store),
            replicas=tuple(range(len(sizes))), bits=bits, top_k=TOP_K.get(rule), timeout_s=PATIENT_S,
        )  # fmt: skip
        chosen = lso.registry.build(method, **of_method)
        engine = engines.build(kind, engines.net((), DTYPES[dtype]), chosen, base=ours(rule), consensus=consensus)
        losses, passes = [], set()
        for step in steps:
            losses.append(engine.train_batch(dealt(step, sizes, number, own)))
            assert engine.last_step is not None
            passes.add(engine.last_step.passes)
        found = weights(engine)
        told = [(e.number, list(e.members), e.well, e.sent_bytes) for e in consensus.exchanges]
        local = sum(p.length for p in engine.space.layout.pieces)
        engines.close(engine)
        tear_down(engine)
    wanted = dict(plain[number].model.named_parameters())
    apart = max(float((r.x - plain[number].x).abs().max()) for r in plain)
    return {
        "dw": max(float((found[n].double() - wanted[n].detach().double()).abs().max()) for n in found),
        "dlosses": [abs(a - b) for a, b in zip(losses, plain[number].losses, strict=True)], "begins": begins,
        "apart": apart, "exchanges": told, "local": local, "passes": sorted(passes),
    }  # fmt: skip


def synchronous(kind: str, sizes: list[int]) -> dict[str, Any]:
    """max |dw| of the mean of replicas that are averaged before each step from a plain loop on the whole batch."""
    me = dist.get_rank()
    number, own = place_of(me, sizes)
    steps, one = engines.batches(5, 2 * sum(sizes), last=2), engines.net()
    paper_loops.run(one, steps, engines.optimizer("sgd")([*one.named_parameters()]), "none", {})
    with away() as fresh:
        store = fresh()
        form_replicas(dist.PrefixStore("groups", store), me, sizes, timedelta(seconds=30), apart=True)
        consensus = Consensus(
            registry.build("local_sgd", tau=1), dist.PrefixStore("consensus", store), replicas=tuple(range(len(sizes))),
            timeout_s=PATIENT_S,
        )  # fmt: skip
        engine = engines.build(kind, engines.net(), lso.Plain(), base="sgd", consensus=consensus)
        for step in steps:
            engine.train_batch(dealt(step, sizes, number, own))
        apart = engines.furthest(engine.space, one)
        engine.space.weights.copy_(consensus.point())
        dw = engines.furthest(engine.space, one)
        engines.close(engine)
        tear_down(engine)
    return {"dw": dw, "apart": apart}


def healed(kind: str, sizes: list[int], *, rule: str = "easgd") -> dict[str, Any]:
    """What becomes of replica 1 when its weights are no numbers any more, in its third step: what it has at the end of
    each step, and of each meeting who was fit."""
    me = dist.get_rank()
    number, own = place_of(me, sizes)
    steps = engines.batches(STEPS, 2 * sum(sizes), last=2, dtype=DTYPES["fp64"])
    with away() as fresh:
        store = fresh()
        form_replicas(dist.PrefixStore("groups", store), me, sizes, timedelta(seconds=30), apart=True)
        consensus = Consensus(
            registry.build(rule, tau=2), dist.PrefixStore("consensus", store), replicas=tuple(range(len(sizes))),
            timeout_s=PATIENT_S,
        )  # fmt: skip
        engine = engines.build(kind, engines.net((), DTYPES["fp64"]), lso.SAM(rho=0.05), consensus=consensus)
        finite = []
        for turn, step in enumerate(steps):
            if turn == 3 and number == 1:
                engine.space.weights.mul_(float("nan"))
                engine.space.copies.refresh()
            engine.train_batch(dealt(step, sizes, number, own))
            finite.append(all(bool(w.isfinite().all()) for w in weights(engine).values()))
        told = [(list(e.members), list(e.fit), e.well) for e in consensus.exchanges]
        momenta = [float(v.double().norm()) for s in engine.base.state.values() for v in s.values() if v is not None]
        clock = engine.clock.samples
        engines.close(engine)
        tear_down(engine)
    return {"finite": finite, "told": told, "momenta": momenta, "clock": clock}
