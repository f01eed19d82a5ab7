"""What updates and averages of ours cost beside torch's: a step with LARS, LAMB, Muon, and one with an EMA.

lars, lamb    a whole step of SAM's base, against AdamW's, on the same backend
muon          the optimizer's own step on all ranks, against torch.optim.Muon's on one, of the same matrices
ema           a step with the average, against one without
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

import elastic_lsopt as lso
from benchmarks.models import SIZES, Size, engine, llama, units
from benchmarks.timing import ratio_of, rounds
from benchmarks.workers import on_ranks, world
from elastic_lsopt.averages.ema import EMA
from elastic_lsopt.updates.muon import Muon
from elastic_lsopt.updates.update_optimizer import UpdateOptimizer

BACKEND = "zero2"


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-4)


def of(update: str) -> Callable[[Any], UpdateOptimizer]:
    return lambda parameters: UpdateOptimizer(list(parameters), update, lr=1e-4)


def matrices(parameters: list[Any]) -> list[Any]:
    """What Muon steps on: the blocks' matrices. The embedding and the head stay with AdamW (Muon, section 2)."""
    shapes = [(p, tuple(getattr(p, "ds_shape", p.shape))) for p in parameters]
    largest = max(max(shape) for _, shape in shapes)
    return [p for p, shape in shapes if len(shape) == 2 and largest not in shape]


def muon(parameters: Any) -> UpdateOptimizer:
    every = list(parameters)
    chosen = {id(p) for p in matrices(every)}
    groups: list[dict[str, Any]] = [
        {"params": [p for p in every if id(p) in chosen], "update": Muon(), "lr": 1e-3},
        {"params": [p for p in every if id(p) not in chosen], "update": "AdamW", "lr": 1e-4},
    ]
    return UpdateOptimizer(groups, lr=0.0)


def blocks_alone(parameters: Any) -> UpdateOptimizer:
    """Muon on the blocks' matrices; all else is frozen."""
    every = list(parameters)
    chosen = matrices(every)
    for p in every:
        p.requires_grad_(any(p is one for one in chosen))
    return UpdateOptimizer(chosen, Muon(), lr=1e-3)


def steps(kind: str, size: str) -> dict[str, object]:
    """Whole steps of one engine a base, in turns with AdamW's (collective)."""
    figures: dict[str, object] = {}
    batch = units(SIZES[size], 1)
    base = engine(kind, SIZES[size], lso.Plain(), base=adamw)
    for name, make in (("lars", of("lars")), ("lamb", of("lamb")), ("muon", muon)):
        ours = engine(kind, SIZES[size], lso.Plain(), base=make)
        times = rounds(
            SIZES[size].pairs, base=lambda: base.train_batch(batch), ours=lambda o=ours: o.train_batch(batch)
        )
        figures |= ratio_of(times["ours"], times["base"]).figures(f"{name}_{kind}_step_of_adamw")
        del ours
    return figures


def ema(kind: str, size: str) -> dict[str, object]:
    """A step with the average and one without, and the bytes that it holds (collective)."""
    batch = units(SIZES[size], 1)
    plain = engine(kind, SIZES[size], lso.Plain(), base=adamw)
    kept = engine(kind, SIZES[size], lso.Plain(), base=adamw, keep=[EMA(decay=0.999)])
    times = rounds(SIZES[size].pairs, base=lambda: plain.train_batch(batch), ours=lambda: kept.train_batch(batch))
    held = sum(
        v.local_bytes for v in kept.families["averages/ema"].state_dict().values() if not isinstance(v, float | int)
    )
    return {
        **ratio_of(times["ours"], times["base"]).figures(f"ema_{kind}_step_of_base"),
        f"ema_{kind}_bytes_of_fp32_shard": held / (4 * kept.space.layout.local_numel),
    }


def muons_own_step(size: str) -> dict[str, object]:
    """Seconds of the optimizer's step alone, ours on all ranks and torch's on each for itself (collective).

    torch's is timed while the other ranks wait, so it has a core of its own as ours has.
    """
    shape: Size = SIZES[size]
    ours = engine("fsdp2", shape, lso.Plain(), base=blocks_alone)
    base = ours.base
    assert isinstance(base, UpdateOptimizer)
    ours.train_batch(units(shape, 1))
    gradient = ours.space.noise(0).vector()
    model = llama(shape)
    chosen = matrices(list(model.parameters()))
    for p in chosen:
        p.grad = torch.randn_like(p)
    torchs = torch.optim.Muon(chosen, lr=1e-3)

    def alone() -> None:
        if dist.get_rank() == 0:
            torchs.step()

    times = rounds(shape.pairs, base=alone, ours=lambda: base.take(gradient))
    return ratio_of(times["ours"], times["base"]).figures("muon_own_step_of_torch_on_one")


def run() -> dict[str, object]:
    """On two ranks of a CPU, or one a device."""
    size = "gpu" if torch.cuda.is_available() else "cpu"
    figures: dict[str, object] = {"size": size, "ranks": world()}
    figures |= on_ranks("benchmarks.step.updates:steps", kind=BACKEND, size=size)
    figures |= on_ranks("benchmarks.step.updates:ema", kind=BACKEND, size=size)
    return figures | on_ranks("benchmarks.step.updates:muons_own_step", size=size)
