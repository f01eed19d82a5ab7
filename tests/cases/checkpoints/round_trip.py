"""Cases of law 4: save in the middle, go on elsewhere; every number arrives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import elastic_lsopt as lso
from elastic_lsopt.averages.ema import EMA
from elastic_lsopt.averages.lawa import LAWA
from elastic_lsopt.averages.swa import SWA
from elastic_lsopt.checkpoint import Checkpointer, folder
from tests.cases import engines
from tests.cases.updates import UPDATES, ours, sampling_loss

STEPS, UNITS = 6, 3
SPACED = [SWA(start=0.0, every_samples=24), LAWA(k=2, every_samples=13)]
"""Averages that take the weights now and then."""
DTYPES = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16}


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


@dataclass(frozen=True, kw_only=True)
class Remembering:
    """A method with a memory of every kind: it steps with the running mean of the gradients."""

    parts: int = 1

    def init(self, space: Any) -> dict[str, Any]:
        return {"mean": space.zeros(), "calls": 0}

    def gradient(self, space: Any, oracle: Any, state: dict[str, Any]) -> Any:
        state["calls"] += 1
        state["mean"].mul_(0.9).add_(oracle.gradient(), alpha=1.0 / state["calls"])
        return state["mean"].clone()


def _engine(kind: str, base: str, dtype: str, seed: int = 0, method: str = "") -> lso.Engine:
    """`zero3+small` has a sub-group a parameter, `+scalar` a parameter without dimensions, `+peft` adapters, with
    `+adversary` Bi-LoRA's second ones, `+used` no parameter that nothing uses, of which torch keeps no state; bf16 is
    ZeRO's, beside fp32 masters. An update of ours has averages beside it.
    """
    kind, *more = kind.split("+")
    zero = {"sub_group_size": 1} if "small" in more else {}
    extra = ("tied",) if "used" in more else ("tied", "unused")
    if "peft" in more:
        extra = tuple(e for e in more if e in ("peft", "adversary"))
    model = engines.net(extra, torch.float32 if dtype == "bf16" else DTYPES[dtype], seed)
    if "scalar" in more:
        model.register_parameter("temperature", nn.Parameter(torch.tensor(1.0 + seed)))
        model.register_forward_hook(lambda module, given, out: out * module.temperature)
    own = base.partition("-")[0] in UPDATES
    chosen = Drifting if base == "drifting" else ours(base) if own else base
    keep = [EMA(decay=0.9), *SPACED] if own else []
    landscape = lso.registry.build(method, **engines.HYPERPARAMETERS[method]) if method else Remembering()
    loss = {"loss_fn": sampling_loss()} if base == "sophia_g" else {}
    return engines.build(
        kind, model, landscape, base=chosen, zero=zero, bf16=dtype == "bf16", keep=keep,
        total_samples=STEPS * UNITS * 4, **loss,
    )  # fmt: skip


def _train(engine: lso.Engine, first: int, last: int, dtype: str) -> list[float]:
    steps = engines.batches(STEPS, UNITS, dtype=DTYPES[dtype])
    return [engine.train_batch(engines.mine(s)) for s in steps[first:last]]


def _weights(engine: lso.Engine) -> dict[str, list[float]]:
    """… and what the averages hold."""
    out = {name: w.double().flatten().tolist() for name, w in engines.whole(engine.space).items()}
    for name, family in engine.families.items():
        if name.startswith("averages"):
            for which, vector in family.state_dict().items():
                found = {} if isinstance(vector, int | float) else _whole(engine.space, vector.tensors)
                out |= {f"{name} {which} {key}": numbers for key, numbers in found.items()}
    return out


def save_midway(
    path: str, kind: str, base: str = "momentum", dtype: str = "fp32", method: str = ""
) -> dict[str, list[float]]:
    """Train 6 steps, saving after 3; the weights at the end."""
    engine = _engine(kind, base, dtype, method=method)
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
    path: str, kind: str, base: str = "momentum", dtype: str = "fp32", method: str = ""
) -> dict[str, list[float]]:
    """Another model, used for a step, takes the checkpoint over and trains the 3 steps that are left."""
    engine = _engine(kind, base, dtype, seed=5, method=method)
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


def transfer(path: str, kind: str, base: str = "adamw") -> dict[str, Any]:
    """Save after 3 steps on the first call, load on the next: weights, base state and method state, whole, by name."""
    engine = _engine(f"{kind}+used", base, "fp32", seed=5)
    checkpoints = Checkpointer(path)
    if folder.latest(path) is None:
        _train(engine, 0, 3, "fp32")
        checkpoints.save(engine, 3)
    else:
        assert checkpoints.resume(engine) is not None
    report = checkpoints.wait()
    assert report is None or report.error is None, report
    space = engine.space
    assert engine.base is not None
    # also of a slot that is empty or all padding on this rank
    steps = [float(engine.base.state[key]["step"]) for key in engine.backend.slot_keys]
    out = {
        "weights": _weights(engine), "mean": _whole(space, engine.method_state["mean"].tensors),
        "exp_avg": _whole(space, space.base_state("exp_avg").tensors),
        "exp_avg_sq": _whole(space, space.base_state("exp_avg_sq").tensors),
        "calls": engine.method_state["calls"], "steps": sorted(set(steps)), "lr": engine.param_groups[0]["lr"],
    }  # fmt: skip
    checkpoints.close()
    engines.close(engine)
    return out


def _whole(space: Any, tensors: list[torch.Tensor]) -> dict[str, list[float]]:
    """A vector by parameter name, gathered by offset in this file's own way."""
    out = {p.name: torch.zeros(p.numel, dtype=torch.float64, device=engines.DEVICE) for p in space.layout.parameters}
    count = {name: torch.zeros_like(t) for name, t in out.items()}
    for piece, t in zip(space.layout.pieces, tensors, strict=True):
        name = space.layout.parameters[piece.parameter].name
        out[name][piece.offset : piece.offset + piece.length] += t.double()
        count[name][piece.offset : piece.offset + piece.length] += 1
    for tensor in (*out.values(), *count.values()):
        dist.all_reduce(tensor)
    return {name: (t / count[name]).tolist() for name, t in out.items()}
