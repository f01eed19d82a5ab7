"""A user's own loop on several ranks: accumulation, autocast, batch norm, unfreezing, a static graph."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import elastic_lsopt as lso
from elastic_lsopt.backends.detect import backend_for
from tests.cases import engines, updates
from tests.cases.api import bare, wrapped
from tests.oracles import paper_loops

STEPS, EACH = 3, 2
"""Optimizer steps, and micro-batches of a rank in each."""


@contextmanager
def unreduced(kind: str, model: Any) -> Iterator[None]:
    """What loops put around all but the last micro-batch."""
    if kind == "ddp":
        with model.no_sync():
            yield
    elif kind == "plain":
        yield
    else:
        model.set_requires_gradient_sync(False)
        yield
        model.set_requires_gradient_sync(True)


def closure_of(optimizer: Any, model: Any, batch: Any, share: float = 1.0) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = paper_loops.cross_entropy(model, batch) * share
        loss.backward()
        return loss

    return closure


def accumulated(kind: str, called: bool, handed_in: bool = True) -> dict[str, Any]:
    """SAM on EACH micro-batches a rank, all but the last perhaps called before, against the paper's loop; fp64."""
    world, rank = dist.get_world_size(), dist.get_rank()
    steps = engines.batches(STEPS, world * EACH, dtype=torch.float64)
    plain = engines.net((), torch.float64)
    model = wrapped(kind, copy.deepcopy(plain))
    make = engines.optimizer("momentum")
    losses = paper_loops.run(plain, steps, make(list(plain.named_parameters())), "sam", {"rho": 0.3})
    optimizer = lso.LandscapeOptimizer(make(list(bare(model).named_parameters())), lso.SAM(rho=0.3))
    apart, refused = 0.0, ""
    for step, wanted in zip(steps, losses, strict=True):
        closures = [closure_of(optimizer, model, step[j * world + rank], 1 / EACH) for j in range(EACH)]
        for closure in closures:
            if handed_in:
                optimizer.accumulate(closure)
            if called and closure is not closures[-1]:
                with unreduced(kind, model):
                    closure()
        try:
            apart = max(apart, abs(optimizer.step(closures[-1]) - wanted))
        except lso.UserError as error:
            refused = str(error)
            break
    return {"dw": engines.furthest(optimizer.space, plain), "dloss": apart, "refused": refused}


def prepared(kind: str) -> dict[str, Any]:
    """accelerate's own `prepare` and `accumulate`, all through what `prepare` gives back, against the paper's; fp64."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    world, rank = dist.get_world_size(), dist.get_rank()
    steps = engines.batches(STEPS, world * EACH, dtype=torch.float64)
    plain = engines.net((), torch.float64)
    model: Any = copy.deepcopy(plain)
    make = engines.optimizer("momentum")
    losses = paper_loops.run(plain, steps, make(list(plain.named_parameters())), "sam", {"rho": 0.3}, clip=0.5)
    optimizer: Any = lso.LandscapeOptimizer(make(list(model.named_parameters())), lso.SAM(rho=0.3), max_grad_norm=0.5)
    try:
        a = Accelerator(cpu=True, gradient_accumulation_steps=EACH)
        if kind == "fsdp2":  # on a CPU accelerate makes DDP of it, unless it is told by hand
            a.state.distributed_type = DistributedType.FSDP
            a.state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="NO_WRAP")
        model, optimizer = a.prepare(model, optimizer)
        schedule = a.prepare(torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0))
        found, passes = [], []
        for step in steps:
            told = []
            for j in range(EACH):
                with a.accumulate(model):

                    @optimizer.accumulate
                    def closure(batch: Any = step[j * world + rank]) -> Tensor:
                        optimizer.zero_grad()
                        loss = paper_loops.cross_entropy(model, batch)
                        a.backward(loss)
                        return loss / EACH

                    told.append(optimizer.step(closure))
                    schedule.step()
                    optimizer.zero_grad()
            found.append(told)
            passes.append(optimizer.last_step.passes)
        dw = engines.furthest(optimizer.space, plain)
        place = type(a.unwrap_model(model) if kind == "fsdp2" else model).__name__
    finally:
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
    apart = max(abs(sum(told) - loss) for told, loss in zip(found, losses, strict=True))
    return {"dw": dw, "dloss": apart, "passes": passes, "place": place, "schedule": schedule.scheduler.last_epoch}


def in_autocast(kind: str, face: str, around: bool) -> dict[str, Any]:
    """Weights after SAM steps in one autocast context, or with one inside each pass; and what the first step told."""
    world = dist.get_world_size()
    steps = engines.batches(STEPS, world)
    model = wrapped(kind, engines.net())

    def bf16(enabled: bool) -> Any:
        return torch.autocast("cpu", dtype=torch.bfloat16) if enabled else nullcontext()

    def loss_fn(model: Any, batch: Any) -> Tensor:
        with bf16(not around):
            return nn.functional.cross_entropy(model(batch[0]).float(), batch[1])

    base, method = engines.optimizer("sgd")(list(bare(model).named_parameters())), lso.SAM(rho=1.0)
    holder: Any
    if face == "engine":
        holder = lso.Engine(backend_for(model, base), method, loss_fn=loss_fn)
    else:
        holder = lso.LandscapeOptimizer(base, method)
    start, told = engines.whole(holder.space), None
    start = {n: t.clone() for n, t in start.items()}
    with bf16(around):
        for step in steps:
            if face == "engine":
                holder.train_batch(engines.mine(step))
            else:
                batch = step[dist.get_rank()]

                def closure(batch: Any = batch) -> Tensor:
                    holder.zero_grad()
                    loss = loss_fn(model, batch)
                    loss.backward()
                    return loss

                holder.step(closure)
            told = told or holder.last_step.fidelity
    now = engines.whole(holder.space)
    return {
        "weights": {n: t.tolist() for n, t in now.items()},
        "moved": max(float((now[n] - start[n]).abs().max()) for n in now),
        "cosine": None if told is None else told.cosine,
    }


def normed(kind: str) -> dict[str, Any]:
    """Running statistics after SAM steps at learning rate 0, against plain forwards of a copy."""
    world, rank = dist.get_world_size(), dist.get_rank()
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    units = [[(torch.randn(6, 5), torch.randint(0, 3, (6,))) for _ in range(world)] for _ in range(STEPS)]
    model = wrapped(kind, copy.deepcopy(plain))
    base = torch.optim.SGD(list(bare(model).named_parameters()), lr=0.0)
    optimizer = lso.LandscapeOptimizer(base, lso.SAM(rho=5.0))
    for step in units:
        optimizer.step(closure_of(optimizer, model, step[rank]))
    # DDP gives everyone rank 0's buffers before each forward; FSDP2 leaves each rank its own.
    seen = [step[0 if kind == "ddp" else rank] for step in units[:-1]] + [units[-1][rank]]
    for x, _ in seen:
        plain(x)
    mine, theirs = dict(bare(model).named_buffers()), dict(plain.named_buffers())
    return {n: float((mine[n] - t).abs().max()) for n, t in theirs.items()}


def unfrozen(kind: str, again: bool = False, update: str = "") -> dict[str, Any]:
    """Two steps with a frozen first layer, unfreeze (and wrap again), two steps, against the paper's; fp64, clipped.
    `update`: with one of ours as the base."""
    world = dist.get_world_size()
    steps = engines.batches(4, world, dtype=torch.float64)
    plain = engines.net((), torch.float64)
    first = next(iter(plain.children()))
    make: Any = engines.optimizer("momentum")
    if update:
        name, options = updates.OPTIONS[update]
        make = partial(lso.UpdateOptimizer, update=name, **options)
    base = updates.theirs(update, plain) if update else make(list(plain.named_parameters()))
    first.requires_grad_(False)
    model = wrapped(kind, copy.deepcopy(plain))
    optimizer = lso.LandscapeOptimizer(make(list(bare(model).named_parameters())), lso.SAM(rho=0.3), max_grad_norm=0.05)
    for some in (steps[:2], steps[2:]):
        paper_loops.run(plain, some, base, "sam", {"rho": 0.3}, clip=0.05)
        try:
            for step in some:
                optimizer.step(closure_of(optimizer, model, step[dist.get_rank()]))
        except lso.UserError as error:
            return {"refused": str(error)}
        plain.requires_grad_(True)
        optimizer.backend.drop_gathered()
        bare(model).requires_grad_(True)
        if again:
            model = wrapped(kind, bare(model))
    return {"dw": engines.furthest(optimizer.space, plain), "parameters": len(optimizer.space.layout.parameters)}


def static_graph(parts: int) -> dict[str, Any]:
    """An engine on DDP with `static_graph` and several micro-batches a rank, against the paper's loop; fp64."""
    world = dist.get_world_size()
    steps = engines.batches(STEPS, world * 3, dtype=torch.float64)
    plain = engines.net((), torch.float64)
    ddp = nn.parallel.DistributedDataParallel(copy.deepcopy(plain), static_graph=True)
    make = engines.optimizer("momentum")
    method, hyper = ("sam", {"rho": 0.3}) if parts == 1 else ("lpf_sgd", {"parts": parts, "gamma": 0.1, "alpha": 1.0})
    losses = paper_loops.run(plain, steps, make(list(plain.named_parameters())), method, hyper)
    base = make(list(ddp.module.named_parameters()))
    engine = lso.Engine(backend_for(ddp, base), lso.registry.build(method, **hyper), loss_fn=paper_loops.cross_entropy)
    found = [engine.train_batch(engines.mine(step)) for step in steps]
    dloss = max(abs(a - b) for a, b in zip(found, losses, strict=True))
    return {"dw": engines.furthest(engine.space, plain), "dloss": dloss}


def beside_another(kind: str) -> dict[str, Any]:
    """SAM steps of one model between two micro-batches of another, as of an actor and a critic; each against its own
    loop, fp64."""
    world, rank = dist.get_world_size(), dist.get_rank()
    steps = engines.batches(STEPS, world * EACH, dtype=torch.float64)
    plains = [engines.net((), torch.float64, seed) for seed in (0, 1)]
    actor, critic = (wrapped(kind, copy.deepcopy(plain)) for plain in plains)
    make = engines.optimizer("momentum")
    actors = [step[:world] for step in steps]
    paper_loops.run(plains[0], actors, make(list(plains[0].named_parameters())), "sam", {"rho": 0.3})
    paper_loops.run(plains[1], steps, make(list(plains[1].named_parameters())), "none", {})
    optimizer = lso.LandscapeOptimizer(make(list(bare(actor).named_parameters())), lso.SAM(rho=0.3))
    other = make(list(bare(critic).named_parameters()))
    for step in steps:
        other.zero_grad()
        with unreduced(kind, critic):
            (paper_loops.cross_entropy(critic, step[rank]) / EACH).backward()
        optimizer.step(closure_of(optimizer, actor, step[rank]))
        (paper_loops.cross_entropy(critic, step[world + rank]) / EACH).backward()
        other.step()
    moved = {n: getattr(p, "full_tensor", lambda p=p: p)() for n, p in bare(critic).named_parameters()}
    critics = max(float((moved[n] - p).abs().max()) for n, p in plains[1].named_parameters())
    return {"actor": engines.furthest(optimizer.space, plains[0]), "critic": critics}
