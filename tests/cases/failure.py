"""One rank raises inside a perturbed pass while the others wait for it in a collective."""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed as dist

import elastic_lsopt as lso
from tests.cases import engines
from tests.oracles.paper_loops import cross_entropy


def one_rank_raises(kind: str, where: str, zero: dict[str, Any] | None = None, bf16: bool = False) -> dict[str, Any]:
    calls = {"n": 0}

    def loss(model: Any, batch: Any) -> torch.Tensor:
        calls["n"] += 1
        bad = dist.get_rank() == 1 and calls["n"] == 4  # the second step's perturbed pass: 2 passes a step, 1 unit each
        if bad and where == "before the forward":
            raise ValueError("oh dear")
        hook = None
        if bad and where == "in the forward":
            hook = engine.module.second.register_forward_hook(_raise)  # type: ignore[operator]
        try:
            out = cross_entropy(model, batch)
        finally:
            if hook:
                hook.remove()
        if bad:
            raise ValueError("oh dear")
        return out

    engine = engines.build(kind, engines.net(), lso.SAM(rho=0.3), loss_fn=loss, zero=zero, bf16=bf16)
    dtype = torch.bfloat16 if bf16 and kind.startswith("zero") else torch.float32
    steps = engines.batches(2, dist.get_world_size(), dtype=dtype)
    engine.train_batch(engines.mine(steps[0]))
    space = engine.space
    before = [t.clone() for t in (*space.weights.tensors, *space.shards.working)]
    copies = gathered(engine)

    def same() -> bool:
        return all(
            torch.equal(a, b) for a, b in zip(before, (*space.weights.tensors, *space.shards.working), strict=True)
        )

    start = time.monotonic()
    try:
        engine.train_batch(engines.mine(steps[1]))
        return {"error": "nothing was raised"}
    except Exception as error:
        out = {"seconds": time.monotonic() - start, "error": str(error), "kind": type(error).__name__}
    out["own_back"] = same()
    try:
        engine.module(steps[0][0][0])
        out["refused"] = False
    except lso.StaleWeights:
        out["refused"] = True
    space.resync()
    out["settled"] = (
        same() and space.in_sync and all(torch.equal(a, b) for a, b in zip(copies, gathered(engine), strict=True))
    )
    try:
        engine.train_batch(engines.mine(steps[1]))
        out["goes_on"] = "yes"
    except Exception as error:
        out["goes_on"] = type(error).__name__
    return out


def _raise(*_: Any) -> None:
    raise ValueError("oh dear")


def gathered(engine: lso.Engine) -> list[torch.Tensor]:
    """The copies of the weights that ZeRO-0 to 2 and plain modules keep whole on each rank."""
    if engine.backend.name == "fsdp2" or engine.backend.name == "zero3":
        return []
    return [p.detach().clone() for p in engine.module.parameters()]
