"""Cases of the checkpoint: law 4, the snapshot, ranks that are killed, a disk that is full, the export."""

from __future__ import annotations

import os
import resource
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import elastic_lsopt as lso
from elastic_lsopt.checkpoint import Checkpointer, folder
from elastic_lsopt.checkpoint.export import export_huggingface
from tests.cases import engines

STEPS, UNITS = 6, 3
DTYPES = {"fp32": torch.float32, "fp64": torch.float64}


class Drifting(torch.optim.Optimizer):
    """A third party's optimizer: element-wise state under a key of its own, a counter, and a tuple in its group."""

    def __init__(self, params: Any, lr: float = 0.05) -> None:
        super().__init__(params, {"lr": lr, "blend": (0.7, 0.3)})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            keep, take = group["blend"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["drift"], state["count"] = torch.zeros_like(p), 0
                state["count"] += 1
                state["drift"].mul_(keep).add_(p.grad, alpha=take)
                p.add_(state["drift"], alpha=-group["lr"] / state["count"] ** 0.5)


def _engine(kind: str, base: str, dtype: str, extra: list[str], seed: int = 0) -> lso.Engine:
    model = engines.net(extra, DTYPES[dtype], seed)
    return engines.build(kind, model, lso.SAM(rho=0.3), base=Drifting if base == "drifting" else base)


def _train(engine: lso.Engine, first: int, last: int, dtype: str) -> list[float]:
    steps = engines.batches(STEPS, UNITS, dtype=DTYPES[dtype])
    return [engine.train_batch(engines.mine(s)) for s in steps[first:last]]


def _weights(engine: lso.Engine) -> dict[str, list[float]]:
    return {name: w.double().flatten().tolist() for name, w in engines.whole(engine.space).items()}


def save_midway(
    path: str, kind: str, base: str = "momentum", dtype: str = "fp32", extra: list[str] | None = None
) -> dict[str, list[float]]:
    """Train 6 steps, saving after 3; the weights at the end."""
    engine = _engine(kind, base, dtype, extra or [])
    checkpoints = Checkpointer(path)
    _train(engine, 0, 3, dtype)
    for group in engine.param_groups:
        group["lr"] *= 0.5
    checkpoints.save(engine, 3, extra={"cursor": 36})
    _train(engine, 3, STEPS, dtype)  # while it is being written
    report = checkpoints.wait()
    assert report is not None and report.error is None, report
    checkpoints.close()
    out = _weights(engine)
    engines.close(engine)
    return out


def resume_and_finish(
    path: str, kind: str, base: str = "momentum", dtype: str = "fp32", extra: list[str] | None = None
) -> dict[str, list[float]]:
    """Another model, used for a step, takes the checkpoint over and trains the 3 steps that are left."""
    engine = _engine(kind, base, dtype, extra or [], seed=5)
    _train(engine, 5, 6, dtype)
    checkpoints = Checkpointer(path)
    found = checkpoints.resume(engine)
    assert found is not None and found.step == 3 and found.extra == {"cursor": 36}
    assert (engine.clock.samples, engine.clock.steps) == (36, 3) == (found.clock.samples, found.clock.steps)
    checkpoints.close()
    _train(engine, 3, STEPS, dtype)
    out = _weights(engine)
    engines.close(engine)
    return out
