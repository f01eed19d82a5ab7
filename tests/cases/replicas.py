"""Several replicas in one job, each against a job of its own on the same micro-batches."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file

import elastic_lsopt as lso
from elastic_lsopt.averages.ema import EMA
from elastic_lsopt.backends.fabric import Gloo
from elastic_lsopt.backends.groups import Groups, form_replicas
from elastic_lsopt.backends.rebuild import form_group, tear_down
from elastic_lsopt.checkpoint.checkpointer import Checkpointer
from elastic_lsopt.checkpoint.huggingface.export import export_huggingface
from tests.cases import engines
from tests.cases.checkpoints.round_trip import Remembering

STEPS = 4
_made = {"stores": 0}


@contextmanager
def away() -> Iterator[Any]:
    """`fresh()` gives a store that no other group has used; the harness's own group is back after the block."""
    store = dist.distributed_c10d._get_default_store()
    me, world = dist.get_rank(), dist.get_world_size()

    def fresh() -> dist.Store:
        _made["stores"] += 1
        return dist.PrefixStore(f"replicas/{_made['stores']}", store)

    tear_down(None)
    try:
        yield fresh
    finally:
        if dist.is_initialized():
            tear_down(None)
        form_group(Gloo(), fresh(), me, world, timedelta(seconds=30))


def place_of(rank: int, sizes: Sequence[int]) -> tuple[int, int]:
    """(replica, rank in it)."""
    number = next(i for i in range(len(sizes)) if rank < sum(sizes[: i + 1]))
    return number, rank - sum(sizes[:number])


def dealt(step: list[Any], sizes: Sequence[int], number: int, rank: int) -> list[lso.MicroBatch]:
    """Micro-batches go to replicas in blocks, two a rank, and inside one in turn."""
    first, count = 2 * sum(sizes[:number]), 2 * sizes[number]
    mine = range(first, first + count)[rank :: sizes[number]]
    return [lso.MicroBatch(index, step[index], place=index - first) for index in mine]


def build(kind: str) -> lso.Engine:
    net = engines.net(["dropout"] if kind != "zero3" else ())
    return engines.build(kind, net, lso.SAM(rho=0.3), clip=0.5, keep=[EMA(decay=0.5)])


def weights(engine: lso.Engine) -> dict[str, torch.Tensor]:
    return {name: t.clone() for name, t in engines.whole(engine.space).items()}


def beside(kind: str, sizes: Sequence[int], bad: bool = False) -> dict[str, Any]:
    """Losses and weights of this rank's replica, in one job and in a job of its own; what the whole job knows."""
    me = dist.get_rank()
    number, own = place_of(me, sizes)
    steps = engines.batches(STEPS, 2 * sum(sizes))
    if bad:
        steps[1][0][0][0, 0] = float("nan")  # replica 0's
    runs: list[Any] = []
    out: dict[str, Any] = {}
    with away() as fresh:
        for together in (True, False):
            store = fresh()
            if together:
                groups: Groups | None = form_replicas(store, me, sizes, timedelta(seconds=30))
            else:
                groups = None
                form_group(
                    Gloo(), dist.PrefixStore(f"alone/{number}", store), own, sizes[number], timedelta(seconds=30)
                )
            engine, losses = build(kind), []
            for i, step in enumerate(steps):
                if together and i == STEPS - 1 and me == sum(sizes) - 1:
                    engine.request_stop()
                losses.append(engine.train_batch(dealt(step, sizes, number, own)))
                stop = engine.last_step is not None and engine.last_step.stop
                if together and stop != (i == STEPS - 1):
                    out["stopped at"] = i
            runs.append((losses, weights(engine)))
            if together:
                assert groups is not None
                out |= {
                    "samples": engine.clock.samples, "skipped": engine.skipped_steps,
                    "job": [groups.job.rank, groups.job.size], "replica": [groups.number, groups.replica.size],
                }  # fmt: skip
            engines.close(engine)
            tear_down(engine)
    (losses, together_weights), (alone_losses, alone_weights) = runs
    out["losses"] = [a == b or (math.isnan(a) and math.isnan(b)) for a, b in zip(losses, alone_losses, strict=True)]
    out["same"] = all(torch.equal(together_weights[n], alone_weights[n]) for n in alone_weights)
    return out


def kept_apart(kind: str, sizes: Sequence[int], path: str) -> dict[str, Any]:
    """Law 8: two replicas that differ, also by one bit of each family, after save and resume in new engines."""
    me = dist.get_rank()
    number, own = place_of(me, sizes)
    steps = engines.batches(STEPS, 2 * sum(sizes))

    def made() -> lso.Engine:
        return engines.build(kind, engines.net(), Remembering(), clip=0.5, keep=[EMA(decay=0.5)])

    def everything(engine: lso.Engine) -> dict[str, list[torch.Tensor]]:
        found = {"weights": [t.clone() for t in engine.space.weights.tensors]}
        for family in engine.families.values():
            for key, value in family.state_dict().items():
                tensors = [torch.tensor(float(value))] if isinstance(value, int | float) else value.tensors
                found[f"{family.name}/{key}"] = [t.clone() for t in tensors]
        return found

    def flip(t: torch.Tensor) -> None:
        t.view(torch.int32)[:1] ^= 1

    with away() as fresh:
        form_replicas(fresh(), me, sizes, timedelta(seconds=30))
        engine = made()
        for step in steps[:2]:
            engine.train_batch(dealt(step, sizes, number, own))
        if number == 1:
            for tensors in (engine.space.weights.tensors, engine.families["averages/ema"].state_dict()["mean"].tensors):  # type: ignore[union-attr]
                for t in tensors[:1]:
                    flip(t)
        before = everything(engine)
        saver = Checkpointer(Path(path))
        saver.save(engine, 2, asynchronous=False)
        saver.wait()
        engines.close(engine)
        tear_down(engine)
        form_replicas(fresh(), me, sizes, timedelta(seconds=30))
        again = made()
        loader = Checkpointer(Path(path))
        loader.resume(again, "auto")
        after = everything(again)
        loader.close()
        engines.close(again)
        tear_down(again)
    same = {key: all(torch.equal(a, b) for a, b in zip(before[key], after[key], strict=True)) for key in before}
    return {"same": same, "first": [float(t.view(-1)[0]) for t in before["weights"][:1]]}


def raised(sizes: Sequence[int]) -> dict[str, Any]:
    """Rank 0's loss raises while the others train: what each rank meets, and after how many seconds."""
    me = dist.get_rank()
    number, own = place_of(me, sizes)
    [step] = engines.batches(1, 2 * sum(sizes))

    def spoilt(model: Any, batch: Any) -> torch.Tensor:
        raise ValueError("on purpose")

    with away() as fresh:
        form_replicas(fresh(), me, sizes, timedelta(seconds=60))
        engine = build("ddp")
        other = lso.Engine(engine.backend, lso.Plain(), loss_fn=spoilt if me == 0 else engine.loss)
        began = time.monotonic()
        try:
            other.train_batch(dealt(step, sizes, number, own))
            met = "nothing"
        except Exception as error:
            met = f"{type(error).__name__}: {error}"
        took_s = time.monotonic() - began
        engines.close(engine)
        tear_down(engine)
    return {"met": met, "took_s": took_s}


def exported(sizes: Sequence[int], path: str) -> dict[str, Any]:
    """Replicas that have drifted apart export at once: whose weights lie there."""
    me = dist.get_rank()
    number, own = place_of(me, sizes)
    with away() as fresh:
        form_replicas(fresh(), me, sizes, timedelta(seconds=30))
        engine = build("fsdp2")
        for step in engines.batches(2, 2 * sum(sizes)):
            engine.train_batch(dealt(step, sizes, number, own))
        export_huggingface(engine.backend, engine.module, path)
        mine = weights(engine)
        found = load_file(Path(path) / "model.safetensors")
        same = {bool(torch.equal(found[name].view(-1), w.view(-1))) for name, w in mine.items()}
        engines.close(engine)
        tear_down(engine)
    return {"replica": number, "mine": same == {True}}
