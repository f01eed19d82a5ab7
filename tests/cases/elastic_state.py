"""Cases of the elastic state: groups that are torn down and formed again in the same processes."""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

import elastic_lsopt as lso
from elastic_lsopt.backends.rebuild import form_group, tear_down
from tests.cases import engines

STEPS, UNITS = 9, 5
_formed = {"groups": 0}


@contextmanager
def reforming() -> Iterator[Any]:
    """`form(members)` in place of the harness's group: the members' ranks are their places in the list; then back."""
    store = dist.distributed_c10d._get_default_store()
    me, world = dist.get_rank(), dist.get_world_size()

    def form(members: Sequence[int]) -> bool:
        """Whether this process is one of the new group's."""
        _formed["groups"] += 1
        if me not in members:
            return False
        place = dist.PrefixStore(f"formed/{_formed['groups']}", store)
        form_group("gloo", place, list(members).index(me), len(members), timedelta(seconds=30))
        return True

    tear_down(None)
    try:
        yield form
    finally:
        if dist.is_initialized():
            tear_down(None)
        form(range(world))


def train(engine: lso.Engine, first: int, last: int, dtype: torch.dtype = torch.float32) -> list[float]:
    """Steps [first, last) of the one run that all cases here train."""
    steps = engines.batches(STEPS, UNITS, dtype=dtype)
    return [engine.train_batch(engines.mine(s)) for s in steps[first:last]]


def rebuild(kind: str, worlds: Sequence[int], sever: bool = False) -> dict[str, Any]:
    """An engine at each world size in turn, in the same processes, from the same weights: losses, and bytes left."""
    losses, seconds, left = [], [], 0
    with reforming() as form:
        for world in worlds:
            if not form(range(world)):
                continue
            engine = engines.build(kind, engines.net(), lso.SAM(rho=0.3))
            losses.append(train(engine, 0, 3))
            weights = list(engine.module.parameters())
            shards = [p.ds_tensor if kind == "zero3" else p for p in weights]
            memory = [weakref.ref(t.untyped_storage()) for t in (*engine.backend.slots, *shards, *weights)]
            del weights, shards
            space = engine.space
            if sever:
                engine.backend.transport.sever()
            start = time.monotonic()
            tear_down(engine)
            seconds.append(time.monotonic() - start)
            try:
                space.norm(space.zeros())
                raise AssertionError("a space of a torn-down engine was used")
            except lso.StaleGeneration:
                del space
            gc.collect()
            left += sum(storage.nbytes() for ref in memory if (storage := ref()) is not None)
    return {"losses": losses, "seconds": seconds, "left": left}
