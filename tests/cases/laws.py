"""Laws 1, 2, 3 and 7 of the design, as cases for one engine kind each."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

import elastic_lsopt as lso
from tests.cases import engines
from tests.oracles import paper_loops

DTYPES = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16}
STEPS = 6


def reference(
    kind: str, method: str, *, dtype: str = "fp32", units: int = 3, last: int | None = None, clip: float = 0.0,
    extra: list[str] | None = None, base: str = "momentum", more: dict[str, Any] | None = None,
    zero: dict[str, Any] | None = None,
) -> dict[str, float]:  # fmt: skip
    """Law 1: max |dw| and the largest difference of a loss, after 6 steps, from the paper's loop on one process."""
    hyper = {**engines.HYPERPARAMETERS[method], **(more or {})}
    steps = engines.batches(STEPS, units, last=last, dtype=DTYPES[dtype])
    plain = engines.net(extra or (), DTYPES[dtype])
    model = copy.deepcopy(plain)
    total = sum(len(x) for s in steps for x, _ in s)
    named = [(n, p) for n, p in plain.named_parameters() if p.requires_grad]
    wanted = paper_loops.run(plain, steps, engines.optimizer(base)(named), method, hyper, clip=clip)
    engine = engines.build(
        kind, model, lso.registry.build(method, **hyper), base=base, clip=clip, total_samples=total, zero=zero
    )
    losses = [engine.train_batch(engines.mine(s)) for s in steps]
    passes = engine.last_step.passes if engine.last_step else 0
    out = {
        "dw": engines.furthest(engine.space, plain),
        "dloss": max(abs(a - b) for a, b in zip(losses, wanted, strict=True)),
        "passes": passes,
    }
    engines.close(engine)
    return out


def rest(
    kind: str, method: str, rest_point: dict[str, Any], units: int = 3, extra: Sequence[str] = (),
    known: tuple[str, dict[str, Any]] = ("none", {}),
) -> dict[str, float]:  # fmt: skip
    """Law 2: at its rest point the method equals the engine with a known one, and still takes its passes.

    `apart`: how far the known one is from the base alone.
    """
    steps = engines.batches(STEPS, units)
    runs = []
    for chosen in (lso.Plain(), lso.registry.build(known[0], **known[1]), lso.registry.build(method, **rest_point)):
        engine = engines.build(kind, engines.net(extra), chosen, total_samples=STEPS * units * 4)
        for s in steps:
            engine.train_batch(engines.mine(s))
        assert engine.last_step
        runs.append((engines.whole(engine.space), engine.last_step.passes))
        engines.close(engine)
    (plain, _), (wanted, _), (ours, passes) = runs
    return {
        "dw": max(float((wanted[n] - ours[n]).abs().max()) for n in plain), "passes": passes,
        "apart": max(float((wanted[n] - plain[n]).abs().max()) for n in plain),
    }  # fmt: skip


def returned(
    kind: str, dtype: str = "fp32", zero: dict[str, Any] | None = None, bf16: bool = False, extra: Sequence[str] = ()
) -> dict[str, Any]:
    """Law 3: after perturbations, nested ones and perturbations, masters, working copies and forward are as before."""
    engine = engines.build(kind, engines.net(extra, DTYPES[dtype]), lso.SAM(), zero=zero, bf16=bf16)
    space = engine.space
    [units] = engines.batches(1, 3, dtype=torch.bfloat16 if bf16 and kind.startswith("zero") else DTYPES[dtype])
    own = engines.mine(units)
    engine.train_batch(own)

    def snapshot() -> list[torch.Tensor]:
        logits = engine.backend.forward(units[0][0])
        if kind != "plain":
            dist.barrier()
        return [t.detach().clone() for t in (*space.weights.tensors, *space.shards.working, logits)]

    def differs(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
        return any(not torch.equal(x, y) for x, y in zip(a, b, strict=True))

    before = snapshot()
    moved, nested = [], []
    with space.perturbed(space.noise(0), 0.1):
        moved.append(snapshot())
        with space.perturbed(space.noise(1), 0.1):
            moved.append(snapshot())
        nested.append(snapshot())
        with space.perturbation() as walk:
            walk.move(space.noise(2), 0.1)
            walk.move(space.noise(3), 0.1)
            moved.append(snapshot())
        nested.append(snapshot())
    with space.perturbation() as walk:
        walk.move(space.noise(2), 0.1)
        walk.move(space.noise(2), 0.1)
        moved.append(snapshot())
    out = {
        "returned": not differs(before, snapshot()),
        "nested": not any(differs(moved[0], n) for n in nested),
        "moved": all(differs(before, m) for m in moved),
    }
    engines.close(engine)
    return out


def raised(kind: str, everywhere: bool) -> dict[str, Any]:
    """Law 3: all ranks raise, weights are back, forward is refused until settle, and training goes on."""
    engine = engines.build(kind, engines.net(), lso.SAM())
    space = engine.space
    [units] = engines.batches(1, 3)
    engine.train_batch(engines.mine(units))
    before = [t.clone() for t in (*space.weights.tensors, *space.shards.working)]
    refused = False
    try:
        with space.perturbed(space.noise(0), 0.1):
            raise ValueError("on purpose")
    except ValueError:
        pass
    back = all(torch.equal(a, b) for a, b in zip(before, (*space.weights.tensors, *space.shards.working), strict=True))
    try:
        engine.backend.forward(units[0][0])
    except lso.StaleWeights:
        refused = True
    space.resync()
    loss = engine.train_batch(engines.mine(units))
    engines.close(engine)
    return {"back": back, "refused": refused, "loss": loss}
