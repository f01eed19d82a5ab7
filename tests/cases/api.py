"""The faces as cases: a user's own loop around LandscapeOptimizer, beside the engine and the paper's loop."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import lr_scheduler

import elastic_lsopt as lso
from tests.cases import engines
from tests.cases.contract import DTYPES, dtype_of, engine_of
from tests.cases.oracle_contract import logged
from tests.oracles import paper_loops

STEPS = 4


def wrapped(kind: str, model: nn.Module, bf16: bool = False) -> nn.Module:
    if kind == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    return model if kind == "plain" else engines.sharded(kind, model, bf16)


def bare(model: nn.Module) -> nn.Module:
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def closure_of(optimizer: Any, model: nn.Module, batch: Any) -> Callable[[], Tensor]:
    """What a user writes for a micro-batch."""

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = paper_loops.cross_entropy(model, batch)
        loss.backward()
        return loss

    return closure


def closures(optimizer: Any, model: nn.Module, units: Sequence[Any]) -> Any:
    """One closure a micro-batch; the closure itself where there is one."""
    made = [closure_of(optimizer, model, batch) for batch in units]
    return made if len(made) > 1 else made[0]


def own_units(units: Sequence[Any]) -> list[Any]:
    return [units[u] for u in range(dist.get_rank(), len(units), dist.get_world_size())]


def user_loop(kind: str, method: str, clip: float = 0.0, base: str = "momentum") -> dict[str, Any]:
    """LandscapeOptimizer against the engine and the paper's loop, fp64."""
    world = dist.get_world_size()
    hyper = engines.HYPERPARAMETERS[method]
    units = world * hyper.get("parts", 1)
    steps = engines.batches(STEPS, units, dtype=torch.float64)
    total = STEPS * units * 4
    plain = engines.net((), torch.float64)
    models = [copy.deepcopy(plain) for _ in range(2)]
    wanted = paper_loops.run(
        plain, steps, engines.optimizer(base)(list(plain.named_parameters())), method, hyper, clip=clip
    )
    build = lso.registry.build
    engine = engines.build(kind, models[0], build(method, **hyper), base=base, clip=clip, total_samples=total)
    by_engine = [engine.train_batch(engines.mine(s)) for s in steps]
    model = wrapped(kind, models[1])
    optimizer = lso.LandscapeOptimizer(
        engines.optimizer(base)(list(bare(model).named_parameters())), build(method, **hyper),
        max_grad_norm=clip or None, samples_per_step=units * 4, total_samples=total,
    )  # fmt: skip
    losses = []
    for s in steps:
        losses.append(optimizer.step(closures(optimizer, model, own_units(s))))
    assert optimizer.last_step and engine.last_step
    ours, engines_own = engines.whole(optimizer.space), engines.whole(engine.space)
    return {
        "dw": engines.furthest(optimizer.space, plain),
        "dengine": max(float((ours[n] - engines_own[n]).abs().max()) for n in ours),
        "dloss": max(abs(a - b) for a, b in zip(losses, wanted, strict=True)),
        "dloss engine": max(abs(a - b) for a, b in zip(losses, by_engine, strict=True)),
        "passes": optimizer.last_step.passes,
    }


def scheduler_of(name: str, optimizer: Any) -> Any:
    match name:
        case "CosineAnnealingLR":
            return lr_scheduler.CosineAnnealingLR(optimizer, T_max=STEPS)
        case "OneCycleLR":
            return lr_scheduler.OneCycleLR(optimizer, max_lr=0.5, total_steps=STEPS + 1)
        case "SequentialLR":
            first = lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=2)
            return lr_scheduler.SequentialLR(optimizer, [first, lr_scheduler.StepLR(optimizer, 1)], milestones=[2])
        case _:
            return lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)


def scheduled(name: str, kind: str, rewrite: bool = False) -> dict[str, Any]:
    """A torch scheduler on LandscapeOptimizer and on a plain torch optimizer in a plain loop: learning rates, weights.

    With `rewrite` the optimizer is built before the model is sharded and its groups are rewritten in place, as
    accelerate does; then the scheduler is built.
    """
    world = dist.get_world_size()
    steps = engines.batches(STEPS, world, dtype=torch.float64)
    plain = engines.net((), torch.float64)
    model: nn.Module = copy.deepcopy(plain)
    make = engines.optimizer("momentum")
    reference = make(list(plain.named_parameters()))
    if rewrite:
        optimizer = lso.LandscapeOptimizer(make(list(model.named_parameters())), lso.SAM(rho=0.0))
        optimizer.load_state_dict(optimizer.state_dict())
        assert optimizer.space.layout.numel  # it has read the layout that is about to change
        placeholders(optimizer)
        model = wrapped(kind, model)
        switch(optimizer, model)
    else:
        model = wrapped(kind, model)
        optimizer = lso.LandscapeOptimizer(make(list(bare(model).named_parameters())), lso.SAM(rho=0.0))
    ours, theirs = scheduler_of(name, optimizer), scheduler_of(name, reference)
    lrs: list[list[float]] = [[], []]
    for s in steps:
        loss, gradient = paper_loops.gradient(plain, s, paper_loops.by_samples(s))
        for n, p in plain.named_parameters():
            p.grad = gradient[n]
        reference.step()
        mine = optimizer.step(closures(optimizer, model, own_units(s)))
        for scheduler, value in ((ours, mine), (theirs, loss)):
            scheduler.step(*([value] if name == "ReduceLROnPlateau" else []))
        lrs[0].append(optimizer.param_groups[0]["lr"])
        lrs[1].append(reference.param_groups[0]["lr"])
    return {"lrs": lrs, "dw": engines.furthest(optimizer.space, plain)}


def placeholders(optimizer: Any) -> None:
    """What accelerate does before `fully_shard`: a parameter becomes one element that knows its origin."""
    for group in optimizer.param_groups:
        for i, p in enumerate(group["params"]):
            group["params"][i] = torch.empty(1, dtype=p.dtype)
            group["params"][i].data_ptr = p.data_ptr()


def switch(optimizer: Any, model: nn.Module) -> None:
    """What accelerate does after it: its own function puts the sharded parameters into the groups."""
    from accelerate.utils.fsdp_utils import fsdp2_switch_optimizer_parameters

    origins = [p.data_ptr for group in optimizer.param_groups for p in group["params"]]
    fsdp2_switch_optimizer_parameters(optimizer, dict(zip(origins, model.parameters(), strict=True)))


@contextmanager
def accelerator() -> Iterator[Any]:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    try:
        yield Accelerator(cpu=True)
    finally:
        AcceleratorState._reset_state(True)
        GradientState._reset_state()


def accelerated(kind: str) -> dict[str, Any]:
    """accelerate's prepare (DDP on several ranks), optimizer and scheduler, against the paper's loop.

    On FSDP2 the model is sharded by hand and accelerate prepares the optimizer and the scheduler.
    """
    world = dist.get_world_size()
    steps = engines.batches(STEPS, world, dtype=torch.float64)
    plain = engines.net((), torch.float64)
    model: nn.Module = copy.deepcopy(plain)
    paper_loops.run(plain, steps, engines.optimizer("sgd")(list(plain.named_parameters())), "sam", {"rho": 0.3})
    optimizer = lso.LandscapeOptimizer(engines.optimizer("sgd")(list(model.named_parameters())), lso.SAM(rho=0.3))
    with accelerator() as a:
        if kind == "ddp":
            model, prepared = a.prepare(model, optimizer)
        else:
            placeholders(optimizer)
            model = wrapped(kind, model)
            switch(optimizer, model)
            prepared = a.prepare(optimizer)
        scheduler = a.prepare(lr_scheduler.LambdaLR(prepared, lambda step: 1.0))
        for s in steps:
            [batch] = own_units(s)

            def closure(batch: Any = batch) -> Tensor:
                prepared.zero_grad()
                loss = paper_loops.cross_entropy(model, batch)
                a.backward(loss)
                return loss

            prepared.step(closure)
            scheduler.step()
        out = {"dw": engines.furthest(optimizer.space, plain), "kind": type(model).__name__}
    assert optimizer.last_step
    return {**out, "passes": optimizer.last_step.passes, "clock": optimizer.state_dict()["landscape"]["clock"][1]}


def resumed(kind: str, way: str) -> dict[str, Any]:
    """Two steps, saved, loaded, two more, against four in one go; LPF-SGD, whose noise needs the clock."""
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    world = dist.get_world_size()
    hyper = engines.HYPERPARAMETERS["lpf_sgd"]
    units = world * hyper["parts"]
    steps = engines.batches(STEPS, units, dtype=torch.float64)

    def start(weights: Any = None) -> tuple[nn.Module, Any]:
        model = engines.net((), torch.float64)
        if weights:
            model.load_state_dict(weights)
        model = wrapped(kind, model)
        base = torch.optim.AdamW(list(bare(model).named_parameters()), lr=1e-2)
        return model, lso.LandscapeOptimizer(
            base, lso.LPFSGD(**hyper), samples_per_step=units * 4, total_samples=STEPS * units * 4
        )

    def go(model: nn.Module, optimizer: Any, some: Any) -> None:
        for s in some:
            optimizer.step(closures(optimizer, model, own_units(s)))

    model, optimizer = start()
    go(model, optimizer, steps[:2])
    weights = {n: t.clone() for n, t in engines.whole(optimizer.space).items()}
    options = StateDictOptions(flatten_optimizer_state_dict=way == "flat", full_state_dict=way == "full")
    if way == "own":
        saved = copy.deepcopy(optimizer.state_dict())
    else:
        saved = copy.deepcopy(get_optimizer_state_dict(bare(model), optimizer, options=options))
    go(model, optimizer, steps[2:])
    again, other = start(weights)
    if way == "own":
        other.load_state_dict(saved)
    else:
        set_optimizer_state_dict(bare(again), other, optim_state_dict=saved, options=options)
    clock = other.state_dict()["landscape"]["clock"]
    go(again, other, steps[2:])
    ours, theirs = engines.whole(optimizer.space), engines.whole(other.space)
    return {"dw": max(float((ours[n] - theirs[n]).abs().max()) for n in ours), "clock": list(clock), "units": units}


def warned(kind: str, rho: float, bf16: bool, ask: bool = False, zero: dict[str, Any] | None = None) -> dict[str, Any]:
    """Messages of four SAM steps, and the cosine that each step's report holds."""
    engine = engine_of(kind, zero, bf16, extra=(), method=lso.SAM(rho=rho))
    engine.space.fidelity.always = ask
    cosines = []
    with logged() as messages:
        for s in engines.batches(STEPS, 3, dtype=dtype_of(kind, "fp32", bf16)):
            engine.train_batch(engines.mine(s))
            assert engine.last_step
            f = engine.last_step.fidelity
            cosines.append(None if f is None else f.cosine)
    engines.close(engine)
    return {"messages": messages, "cosines": cosines}


def clipped(kind: str, max_grad_norm: float | None, dtype: str = "fp64") -> dict[str, Any]:
    """The length of one SGD step at learning rate 0.1, over 0.1, and the reported norm of the gradient."""
    world = dist.get_world_size()
    model = wrapped(kind, engines.net((), DTYPES[dtype]))
    base = torch.optim.SGD(list(bare(model).named_parameters()), lr=0.1)
    optimizer = lso.LandscapeOptimizer(base, lso.SAM(rho=0.3), max_grad_norm=max_grad_norm)
    before = {n: t.clone() for n, t in engines.whole(optimizer.space).items()}
    [units] = engines.batches(1, world, dtype=DTYPES[dtype])
    optimizer.step(closures(optimizer, model, own_units(units)))
    after = engines.whole(optimizer.space)
    assert optimizer.last_step
    return {
        "length": paper_loops.norm([after[n] - before[n] for n in after]) / 0.1,
        "reported": optimizer.last_step.gradient_norm,
    }
