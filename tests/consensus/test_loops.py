"""Law 1 of consensus, the mathematics alone: rules in one process against loops over whole models."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from elastic_lsopt.consensus import registry
from tests.cases import consensus, engines, together
from tests.oracles import consensus as oracle

DOUBLE = torch.float64
UNEVEN = [range(2), range(2, 6), range(6, 7)]
"""Whose micro-batches: replicas of 8, 16 and 2 samples per step."""
ROWS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    *((rule, hyper, {}) for rule, hyper in consensus.HYPERPARAMETERS.items() if rule != "sparseloco"),
    ("lsgd", {"pull": 0.3, "prox": 0.0, "window": 3, "group": 2, "global_every": 2}, {}),
    ("mgrawa", {"decay": 0.0}, {}),
    ("streaming_diloco", {"fragments": 2, "overlap": 0, "alpha": 0.0, "lr": 0.7, "momentum": 0.9}, {}),
    ("sparseloco", {"lr": 0.8, "decay": 0.9}, {"k": 7, "chunk": 64}),
]


@pytest.mark.parametrize("kind", ["plain"])
@pytest.mark.parametrize("rule,hyper,more", ROWS, ids=[row[0] for row in ROWS])
def test_drift_is_the_loops(rule: str, hyper: dict[str, Any], more: dict[str, Any], kind: str) -> None:
    """Three replicas of unequal size, 13 steps, four exchanges."""
    steps = engines.batches(13, 7, last=2, dtype=DOUBLE)
    made = registry.build(rule, tau=6 if "fragments" in hyper else 3, **hyper)
    method, of_method = consensus.METHODS.get(rule, consensus.SAM)
    plain = [oracle.Replica(net, consensus.theirs(rule, net)) for net in (engines.net((), DOUBLE) for _ in UNEVEN)]
    known = {**consensus.given(rule, 3, hyper, kind), **more}
    oracle.drifted(plain, steps, UNEVEN, rule, made.every, known, method, of_method, overlap=hyper.get("overlap", 0))
    members, _ = together.drifted(
        made, steps, UNEVEN, method=method, of_method=of_method, base=consensus.ours(rule), kind=kind,
        told=largest(**more) if more else None,
    )  # fmt: skip
    assert max(float((m.x - r.x).abs().max()) for m, r in zip(members, plain, strict=True)) <= 1e-12
    apart = max(float((m.x - members[0].x).abs().max()) for m in members)
    assert apart > 1e-4, "the replicas are alike: the test sees nothing"


def largest(k: int, chunk: int) -> together.Told:
    """The k largest of each chunk of a flat vector."""

    def told(flat: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(flat)
        for own, part in zip(out.split(chunk), flat.split(chunk), strict=True):
            places = part.abs().topk(min(k, len(part))).indices
            own[places] = part[places]
        return out

    return told
