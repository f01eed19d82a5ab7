"""Cases for unequal shares: the same global batch, its units dealt by a plan instead of one by one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

import elastic_lsopt as lso
from tests.cases.engines import HYPERPARAMETERS, batches, build, close, net, whole


def trained(kind: str, method: str, shares: Sequence[Sequence[int]] | None, extra: Sequence[str]) -> Any:
    """Weights and losses after three steps; `shares` None: unit u at rank u mod world."""
    rank, world = dist.get_rank(), dist.get_world_size()
    engine = build(kind, net(extra), lso.registry.build(method, **HYPERPARAMETERS[method]), total_samples=69)
    losses = []
    for units in batches(3, 6, last=3):
        own = range(rank, 6, world) if shares is None else shares[rank]
        mine = [lso.MicroBatch(u, units[u]) for u in own] or [lso.MicroBatch(0, units[0], idle=True)]
        losses.append(engine.train_batch(mine))
    passes = engine.last_step.passes if engine.last_step else 0
    weights = whole(engine.space)
    close(engine)
    return weights, losses, passes


def as_dealt_evenly(kind: str, method: str, shares: list[list[int]], extra: list[str]) -> dict[str, float]:
    """How far the weights and the losses are from those of even shares."""
    even, even_losses, passes = trained(kind, method, None, extra)
    own, losses, own_passes = trained(kind, method, shares, extra)
    assert passes == own_passes
    return {
        "dw": max(float((own[n] - even[n]).abs().max()) for n in even),
        "loss": max(abs(a - b) for a, b in zip(losses, even_losses, strict=True)),
    }


def refused(kind: str, shares: list[list[int]]) -> str:
    """What the engine says to these shares."""
    engine = build(kind, net(), lso.registry.build("none"))
    units = batches(1, 6)[0]
    try:
        engine.oracle([lso.MicroBatch(u, units[abs(u) % 6]) for u in shares[dist.get_rank()]])
        return "nothing"
    except lso.UserError as error:
        return str(error)
    finally:
        close(engine)
