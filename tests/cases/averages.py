"""Means of the weights on every way to lay them out, against plain loops over the whole weights of each step."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

import elastic_lsopt as lso
from tests.cases import engines
from tests.cases.laws import DTYPES
from tests.oracles import paper_loops, updates


def followed(kind: str, dtype: str = "fp64") -> dict[str, Any]:
    """Six steps, in batches of two sizes, the fourth skipped: where SWA and LAWA lie, and the loss there and after."""
    world, number = dist.get_world_size(), DTYPES[dtype]
    steps = engines.batches(3, world + 1, dtype=number) + engines.batches(3, 2 * world, dtype=number)
    sizes = [sum(len(x) for x, _ in step) for step in steps]
    steps[3] = [(torch.full_like(x, torch.nan), y) for x, y in steps[3]]
    keep = [lso.SWA(start=0.3, every_samples=sizes[0] + 1), lso.LAWA(k=2, every_samples=1)]
    engine = engines.build(kind, engines.net((), number), lso.Plain(), keep=keep, total_samples=sum(sizes))
    held, points, clocks, before_it_begins = [engines.mine(steps[0])], [], [], True
    for step in steps:
        engine.train_batch(engines.mine(step))
        if not engine.last_step.skipped:  # type: ignore[union-attr]
            points.append({n: t.clone() for n, t in engines.whole(engine.space).items()})
            clocks.append(engine.clock.samples)
        if engine.clock.samples < 0.3 * sum(sizes):
            here = engines.whole(engine.space, engine.average("swa"))
            before_it_begins &= all(torch.equal(here[n], points[-1][n]) for n in here)
            with engine.averaged("swa"):
                before_it_begins &= engine.evaluate(held) > 0
    taken = {
        "swa": updates.spaced(points, clocks, 0.3 * sum(sizes), sizes[0] + 1),
        "lawa": updates.spaced(points, clocks, 0, 1)[-2:],
    }
    out: dict[str, Any] = {"began late": before_it_begins, "taken": [len(taken["swa"]), engine.clock.steps]}
    before = engine.evaluate(held)
    for name, weights in taken.items():
        wanted = {n: torch.stack([w[n].double() for w in weights]).mean(0) for n in points[0]}
        found = engines.whole(engine.space, engine.average(name))
        there = engines.net((), torch.float64)
        with torch.no_grad():
            for n, p in there.named_parameters():
                p.copy_(wanted[n])
        with engine.averaged(name):
            inside = engine.evaluate(held)
        loss = sum(float(paper_loops.cross_entropy(there, (x.double(), y))) * len(x) for x, y in steps[0]) / sizes[0]
        kept = [v for v in engine.families[f"averages/{name}"].state_dict().values() if not isinstance(v, int | float)]
        out[name] = {
            "mean": max(float((found[n] - wanted[n]).abs().max()) for n in found), "loss": abs(inside - loss),
            "back": abs(engine.evaluate(held) - before), "moved": abs(inside - before),
            "vectors": sum(v.local_bytes for v in kept) / (engine.space.weights.local_bytes or 1),
        }  # fmt: skip
    engines.close(engine)
    return out
