"""What updates and averages of ours cost beside torch's: a step with LARS, LAMB, Muon, and one with an EMA.

lars, lamb    a whole step of SAM's base, against AdamW's, on the same backend
muon          the optimizer's own step on all ranks, against torch.optim.Muon's on one, of the same matrices
averages      a step with the average, against one without, and the memory of each
adamw         the own step of a job's AdamW on one process, against torch's fused one
soap          the own steps of ten, from one basis to the next, against pytorch_optimizer's SOAP, the authors' algorithm
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
from elastic_lsopt.averages.lawa import LAWA
from elastic_lsopt.averages.swa import SWA
from elastic_lsopt.config.settings import TrainConfig
from elastic_lsopt.training.building.base_optimizer import base_of
from elastic_lsopt.updates.muon import Muon
from elastic_lsopt.updates.update_optimizer import UpdateOptimizer

BACKEND = "zero2"
LAWA_COPIES = 2
MOST, SOAP_STEPS = 2048, 10
"""Longest side that SOAP turns: not the vocabulary's, whose decomposition alone takes a minute on a core; and the steps
from one basis to the next."""


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


def averages(kind: str, size: str) -> dict[str, object]:
    """A step with each average and one without, and the bytes that it holds of an fp32 shard (collective)."""
    batch = units(SIZES[size], 1)
    plain = engine(kind, SIZES[size], lso.Plain(), base=adamw)
    kinds = {"ema": EMA(decay=0.999), "swa": SWA(start=0.0), "lawa": LAWA(k=LAWA_COPIES)}
    kept = {
        name: lso.Engine(plain.backend, lso.Plain(), loss_fn=plain.loss, total_samples=10**9, keep=[average])
        for name, average in kinds.items()
    }
    works: dict[str, Any] = {name: lambda e=e: e.train_batch(batch) for name, e in kept.items()}
    times = rounds(SIZES[size].pairs, base=lambda: plain.train_batch(batch), **works)
    figures: dict[str, object] = {}
    for name, e in kept.items():
        state = e.families[f"averages/{name}"].state_dict()
        held = sum(v.local_bytes for v in state.values() if not isinstance(v, float | int))
        figures |= ratio_of(times[name], times["base"]).figures(f"{name}_{kind}_step_of_base")
        figures[f"{name}_{kind}_bytes_of_fp32_shard"] = held / (4 * e.space.layout.local_numel)
    return figures


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


def own_steps(size: str) -> dict[str, object]:
    """The own steps of AdamW and SOAP on one process, beside torch's fused AdamW and the authors' algorithm."""
    import pytorch_optimizer

    shape, model, other = SIZES[size], llama(SIZES[size]), llama(SIZES[size])
    config = TrainConfig(
        output_dir="-", dataset="python-stdlib", model={"model_type": "llama"}, optim="adamw", learning_rate=1e-4,
        weight_decay=0.01, per_device_train_batch_size=1, global_batch_size=1, max_steps=1,
    )  # fmt: skip
    ours = engine("plain", shape, lso.Plain(), base=base_of(config, model), model=model)
    gradient = _gradients(ours, other)
    fused = torch.optim.AdamW(other.parameters(), lr=1e-4, fused=True)
    times = rounds(shape.pairs, base=fused.step, ours=lambda: ours.backend.step(gradient, None))
    figures = ratio_of(times["ours"], times["base"]).figures("adamw_own_step_of_torchs_fused")

    soap = engine("plain", shape, lso.Plain(), base=lambda ps: UpdateOptimizer(list(ps), "soap", lr=1e-4, most=MOST))
    given, base = _gradients(soap, other), soap.base
    authors = pytorch_optimizer.SOAP(list(other.parameters()), lr=1e-4, max_precondition_dim=MOST)
    assert isinstance(base, UpdateOptimizer)
    times = rounds(
        max(2, shape.pairs // 2),
        base=lambda: [authors.step() for _ in range(SOAP_STEPS)],
        ours=lambda: [base.take(given) for _ in range(SOAP_STEPS)],
    )
    return figures | ratio_of(times["ours"], times["base"]).figures("soap_own_step_of_the_authors")


def _gradients(ours: lso.Engine, other: Any) -> Any:
    """Random ones for both: installed in the engine, and returned as a Vector; those of the other model in `.grad`."""
    gradient = ours.space.noise(0).vector()
    ours.backend.install(gradient)
    for p in other.parameters():
        p.grad = torch.randn_like(p)
    return gradient


def run() -> dict[str, object]:
    """On two ranks of a CPU, or one a device."""
    size = "gpu" if torch.cuda.is_available() else "cpu"
    figures: dict[str, object] = {"size": size, "ranks": world()}
    figures |= on_ranks("benchmarks.step.updates:steps", kind=BACKEND, size=size)
    figures |= on_ranks("benchmarks.step.updates:averages", kind=BACKEND, size=size)
    figures |= on_ranks("benchmarks.step.updates:own_steps", processes=1, size=size)
    return figures | on_ranks("benchmarks.step.updates:muons_own_step", size=size)
