"""Replicas that are put at known points, meet there, and take a step: what the exchange and the step tell of it."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import elastic_lsopt as lso
from elastic_lsopt.api.replicas.consensus import Consensus
from elastic_lsopt.backends.groups import form_replicas
from elastic_lsopt.backends.rebuild import tear_down
from elastic_lsopt.consensus import registry
from tests.cases import engines
from tests.cases.consensus import PATIENT_S
from tests.cases.laws import DTYPES
from tests.cases.replicas import away, dealt, place_of
from tests.oracles import paper_loops

EXCHANGES = 3
HYPERPARAMETERS: dict[str, dict[str, Any]] = {
    "streaming_diloco": {"fragments": 2, "overlap": 0, "alpha": 0.0}, "al_dsgd": {"graph": "ring"},
}  # fmt: skip
BY_SAMPLES = ("local_sgd", "diloco", "streaming_diloco")
"""Rules whose mean counts samples; that of the others here counts replicas alike, but for those in `WEIGHED`."""
WEIGHED = ("mgrawa", "lgrawa")


def points(seed: int, replicas: int, dtype: torch.dtype) -> list[dict[str, Tensor]]:
    """Of each replica, by parameter: a model, and a random step off it."""
    draw = torch.Generator().manual_seed(seed)
    start = {n: p.detach() for n, p in engines.net((), dtype).named_parameters()}
    return [
        {n: p + 0.1 * torch.randn(p.shape, dtype=dtype, generator=draw) for n, p in start.items()}
        for _ in range(replicas)
    ]


def put(space: Any, at: dict[str, Tensor]) -> None:
    for piece, t in zip(space.layout.pieces, space.weights.tensors, strict=True):
        whole = at[space.layout.parameters[piece.parameter].name].reshape(-1)
        t.copy_(whole[piece.offset : piece.offset + piece.length])
    space.copies.refresh()


def flat(of: dict[str, Tensor], names: Any = None) -> Tensor:
    """One vector, in the order of the names; zero in the parameters that are not chosen."""
    chosen = [of[n].double() if names is None or n in names else torch.zeros_like(of[n]).double() for n in sorted(of)]
    return torch.cat([t.reshape(-1) for t in chosen])


def met(
    kind: str, sizes: list[int], rules: list[str], *, dtype: str = "fp64", bits: int = 32, span: int = 2
) -> list[dict[str, Any]]:  # fmt: skip
    """Of each rule and exchange: what was told, and what a loop on the known points makes of it."""
    out = []
    for rule in rules:
        out.append(_met(kind, sizes, rule, DTYPES[dtype], bits, span))
        dist.barrier()  # or one would leave the harness's group while another still joins it
    return out


def _met(kind: str, sizes: list[int], rule: str, dtype: torch.dtype, bits: int, span: int) -> dict[str, Any]:
    me = dist.get_rank()
    number, own = place_of(me, sizes)
    steps = engines.batches(EXCHANGES + 1, 2 * sum(sizes), last=2, dtype=dtype)
    owns = [range(2 * sum(sizes[:r]), 2 * sum(sizes[: r + 1])) for r in range(len(sizes))]
    out: list[dict[str, Any]] = []
    with away() as fresh:
        store = fresh()
        form_replicas(dist.PrefixStore("groups", store), me, sizes, timedelta(seconds=30), apart=True)
        consensus = Consensus(
            registry.build(rule, **{"tau": 1000, **HYPERPARAMETERS.get(rule, {})}),
            dist.PrefixStore("consensus", store), replicas=tuple(range(len(sizes))), bits=bits, timeout_s=PATIENT_S,
            disagreement_span=span,
        )  # fmt: skip
        engine = engines.build(kind, engines.net((), dtype), lso.Plain(), base="sgd", consensus=consensus)
        engine.train_batch(dealt(steps[0], sizes, number, own))
        names = [p.name for p in engine.space.layout.parameters]
        gaps: list[Tensor] = []
        for turn, step in enumerate(steps[1:]):
            everyones = points(turn, len(sizes), dtype)
            put(engine.space, everyones[number])
            told = consensus.exchange(engine.oracle(dealt(step, sizes, number, own)))
            assert told is not None and told.well, told
            at = engines.whole(engine.space)
            engine.train_batch(dealt(step, sizes, number, own))
            chosen = set(names)
            if rule == "streaming_diloco":
                chosen = {p.name for p in consensus.rule.part(engine.space, told.number).layout.parameters}
            x = torch.stack([flat(point, chosen) for point in everyones])
            samples = [sum(len(steps[turn][u][0]) for u in r) for r in owns]
            if rule not in BY_SAMPLES or bits == 2:  # of which the mean is found by a reduction of its own
                samples = [1] * len(sizes)
            shares = torch.tensor(samples, dtype=torch.float64) / sum(samples)
            gaps = [*gaps, x[number] - shares @ x][-(span or 1) :]
            model = engines.net((), dtype)
            with torch.no_grad():
                for name, p in model.named_parameters():
                    p.copy_(at[name])
            units = [step[u] for u in owns[number]]
            g = flat(paper_loops.gradient(model, units, paper_loops.by_samples(units))[1])
            q = torch.linalg.qr(torch.stack(gaps).T).Q
            apart = x - x.mean(0)
            out.append({
                "gram": None if told.disagreement is None else told.disagreement.gram.tolist(),
                "wanted_gram": (apart @ apart.T).tolist(), "span": consensus.in_the_span,
                "wanted_share": float((q.T @ g).square().sum() / g.square().sum()), "rank": len(gaps),
                "numbers": len(g), "chosen": len(chosen), "parameters": len(names),
                "after": float(flat(engines.whole(engine.space)).sum()),
            })  # fmt: skip
        engines.close(engine)
        tear_down(engine)
    return {"rule": rule, "exchanges": out}
