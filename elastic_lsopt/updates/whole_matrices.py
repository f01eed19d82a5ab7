"""Which parameters take Muon: matrices that are neither embeddings nor the output head. The rest takes AdamW."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from elastic_lsopt.updates.muon import Muon
from elastic_lsopt.updates.update_optimizer import UpdateOptimizer


def not_for_muon(model: nn.Module) -> frozenset[str]:
    """The names of weights whose rows are looked up or are classes, which no orthogonal step suits."""
    found = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    ask = getattr(model, "get_output_embeddings", None)
    head = ask() if ask is not None else None
    found |= {id(p) for p in head.parameters()} if isinstance(head, nn.Module) else set()
    return frozenset(name for name, p in model.named_parameters() if id(p) in found)


def muon_beside_adamw(
    parameters: Iterable[nn.Parameter], matrices: frozenset[int], *, muon: Mapping[str, Any], adamw: Mapping[str, Any]
) -> UpdateOptimizer:
    """Muon for the parameters whose `id` is in `matrices`, AdamW for the others; by their groups' entries."""
    given = list(parameters)
    groups = [
        {"params": [p for p in given if id(p) in matrices], "update": Muon, **muon},
        {"params": [p for p in given if id(p) not in matrices], "update": "AdamW", **adamw},
    ]
    return UpdateOptimizer([group for group in groups if group["params"]], lr=0.0)
