"""Replicas that drift and meet, each an engine on ranks of its own, against whole models in one process."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch.distributed as dist

import elastic_lsopt as lso
from elastic_lsopt.api.consensus import Consensus
from elastic_lsopt.backends.groups import form_replicas
from elastic_lsopt.backends.rebuild import tear_down
from elastic_lsopt.consensus import registry
from tests.cases import engines
from tests.cases.laws import DTYPES
from tests.cases.replicas import away, dealt, place_of, weights
from tests.oracles import consensus as oracle

STEPS = 8
HYPERPARAMETERS: dict[str, dict[str, Any]] = {
    "local_sgd": {"pull": 0.7}, "easgd": {"beta": 0.8}, "dppf": {"pull": 0.3, "push": 0.05},
    "diloco": {"lr": 0.7, "momentum": 0.9}, "lsgd": {"pull": 0.3, "prox": 0.4, "window": 2},
    "mgrawa": {}, "lgrawa": {"pull": 0.6}, "eamsgd": {"beta": 0.8}, "lsam": {"beta": 0.5},
    "al_dsgd": {"graph": "ring", "c1": 0.2, "c2": 0.1, "p1": 0.2, "p2": 0.1},
}  # fmt: skip


def drift(
    kind: str, sizes: list[int], rule: str, *, tau: int = 3, dtype: str = "fp64", more: dict[str, Any] | None = None,
    method: str = "sam", bits: int = 32,
) -> dict[str, Any]:  # fmt: skip
    """max |dw| of this rank's replica from the plain loop, after 8 steps with meetings before steps 3 and 6."""
    me, hyper = dist.get_rank(), {**HYPERPARAMETERS[rule], **(more or {})}
    number, own = place_of(me, sizes)
    steps = engines.batches(STEPS, 2 * sum(sizes), last=2, dtype=DTYPES[dtype])
    of_method = engines.HYPERPARAMETERS[method]
    plain = [
        oracle.Replica(net, engines.optimizer("momentum")(list(net.named_parameters())))
        for net in (engines.net((), DTYPES[dtype]) for _ in sizes)
    ]
    owns = [range(2 * sum(sizes[:r]), 2 * sum(sizes[: r + 1])) for r in range(len(sizes))]
    graphs = {2: [[(0, 1)]], 3: [[(0, 1)], [(0, 2)], [(1, 2)]]}[len(sizes)]  # the ring's matchings, one at a time
    known = {**hyper, "rounds": graphs} if rule == "al_dsgd" else hyper
    oracle.trained(plain, steps, owns, rule, tau, known, method, of_method)
    with away() as fresh:
        store = fresh()
        form_replicas(dist.PrefixStore("groups", store), me, sizes, timedelta(seconds=30), apart=True)
        consensus = Consensus(
            registry.build(rule, tau=tau, **hyper), dist.PrefixStore("consensus", store),
            replicas=tuple(range(len(sizes))), bits=bits, timeout_s=20.0,
        )  # fmt: skip
        chosen = lso.registry.build(method, **of_method)
        engine = engines.build(kind, engines.net((), DTYPES[dtype]), chosen, consensus=consensus)
        losses = [engine.train_batch(dealt(step, sizes, number, own)) for step in steps]
        found = weights(engine)
        told = [(e.number, list(e.members), e.well, e.sent_bytes) for e in consensus.exchanges]
        local = sum(p.length for p in engine.space.layout.pieces)
        engines.close(engine)
        tear_down(engine)
    wanted = dict(plain[number].model.named_parameters())
    apart = max(float((r.x - plain[number].x).abs().max()) for r in plain)
    return {
        "dw": max(float((found[n].double() - wanted[n].detach().double()).abs().max()) for n in found),
        "dloss": max(abs(a - b) for a, b in zip(losses, plain[number].losses, strict=True)),
        "apart": apart, "exchanges": told, "local": local,
    }  # fmt: skip


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
            timeout_s=20.0,
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
