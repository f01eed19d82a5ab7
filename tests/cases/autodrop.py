"""AutoDrop's angles on every way to lay the weights out, against a plain loop over the whole weights."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist

import elastic_lsopt as lso
from elastic_lsopt.schedules.autodrop import AutoDrop
from tests.cases import engines
from tests.cases.laws import DTYPES


def turned(kind: str, dtype: str = "fp64") -> dict[str, Any]:
    """The angle after each of seven windows of two steps, by the family and by the loop; Vectors that it holds."""
    steps = engines.batches(15, dist.get_world_size() + 1, dtype=DTYPES[dtype])
    size = sum(len(x) for x, _ in steps[0])
    engine = engines.build(kind, engines.net((), DTYPES[dtype]), lso.Plain(), keep=[AutoDrop(window_samples=2 * size)])
    state: Any = engine.families["autodrop"].state_dict()

    def flat() -> torch.Tensor:
        return torch.cat([t.double().reshape(-1) for t in engines.whole(engine.space).values()])

    points, found = [flat()], []
    for number, step in enumerate(steps, 1):
        engine.train_batch(engines.mine(step))
        if number % 2 == 0:
            points.append(flat())
            found.append(state["omega"])
    moves = [b - a for a, b in pairwise(points)]
    cosines = [float(a @ b / (a.norm() * b.norm())) for a, b in pairwise(moves)]
    wanted = [-1.0, *torch.rad2deg(torch.arccos(torch.tensor(cosines, dtype=torch.float64))).tolist()]
    held = sum(v.local_bytes for v in state.values() if not isinstance(v, int | float))
    engines.close(engine)
    return {
        "off": max(abs(a - b) for a, b in zip(found, wanted, strict=True)), "turns": max(wanted) - min(wanted[1:]),
        "vectors": held / (engine.space.weights.local_bytes or 1) if engine.space.layout.pieces else 2.0,
    }  # fmt: skip
