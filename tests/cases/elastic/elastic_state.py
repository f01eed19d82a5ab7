"""Cases of the elastic state: groups that are torn down and formed again in the same processes."""

from __future__ import annotations

import gc
import json
import os
import time
import weakref
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

import elastic_lsopt as lso
from elastic_lsopt.averages.ema import EMA
from elastic_lsopt.backends.agreement import gather_json
from elastic_lsopt.backends.rebuild import tear_down
from elastic_lsopt.elastic.memory.mirror import Mirror
from elastic_lsopt.elastic.memory.reshard import choose, inventory, reshard
from elastic_lsopt.elastic.memory.versions import HostVersions
from tests.cases import engines
from tests.cases.checkpoints.round_trip import SPACED, Remembering
from tests.cases.checkpoints.round_trip import _whole as whole_vector
from tests.cases.elastic.reforming import reforming
from tests.cases.updates import UPDATES, ours

STEPS, UNITS = 9, 5


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
            shards = [p.ds_tensor if kind.startswith("zero3") else p for p in weights]
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


def another_past(before: str, kind: str) -> dict[str, Any]:
    """Rank 0 has had an engine of the kind `before`, and rank 1 none; then both train one of `kind`: losses, and
    whether torch's functions are its own again after each."""
    losses, own = [], []
    with reforming() as form:
        for world, each in ((1, before), (2, kind)):
            if form(range(world)):
                engine = engines.build(each, engines.net(), lso.SAM(rho=0.3))
                losses.append(train(engine, 0, 3))
                tear_down(engine)
                own.append(torch.nn.functional.linear is torch._C._nn.linear)
    return {"losses": losses, "own": own}


# -- state that survives ---------------------------------------------------------------------------------------------

WORLD = 4
"""Processes of the harness in these cases."""


def _engine(kind: str, base: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> lso.Engine:
    """An update of ours has averages beside it; of `fsdp2+peft` adapters are trained."""
    own = base in UPDATES
    keep = [EMA(decay=0.9), *SPACED] if own else []
    kind, _, peft = kind.partition("+")
    model = engines.net(("peft",) if peft else ("unused",), dtype, seed)
    return engines.build(kind, model, Remembering(), base=ours(base) if own else base, keep=keep)


def zeros(piece: Any) -> torch.Tensor:
    return torch.zeros(piece.length, device=engines.DEVICE)


def _state(engine: lso.Engine) -> dict[str, Any]:
    """Everything by name, whole, on every rank, gathered in the checkpoint tests' own way."""
    space, base = engine.space, engine.base
    assert base is not None
    held: dict[tuple[str, str], list[torch.Tensor]] = {("", "weights"): space.weights.tensors}
    spaces: dict[tuple[str, str], Any] = {}
    numbers: dict[str, float] = {}
    for name, family in engine.families.items():
        for key, value in family.state_dict().items():
            if isinstance(value, int | float):
                numbers[f"{name} {key}"] = value
            else:
                held[name, key], spaces[name, key] = value.tensors, value.space
    kept = {key for k in engine.backend.slot_keys for key, v in base.state[k].items() if getattr(v, "ndim", 0)}
    for key in kept:
        found = {id(piece): value for piece, name, value in engine.backend.base_states() if name == key}
        held["base", key] = [found.get(id(p), zeros(p)) for p in space.layout.pieces]
    # A rank without a piece of some parameters has no state of them either.
    everyones = gather_json(dist.distributed_c10d._get_default_group(), sorted(map(list, held)))
    tensors: dict[str, Any] = {}
    for name, key in sorted({(name, key) for keys in everyones for name, key in keys}):
        of = spaces.get((name, key)) or (engine.families[name].space if name in engine.families else space)
        own = held.get((name, key))
        tensors[f"{name} {key}"] = whole_vector(of, [*map(zeros, of.layout.pieces)] if own is None else own)
    return {
        **tensors, "numbers": numbers, "clock": [engine.clock.samples, engine.clock.steps],
        "groups": [{k: v for k, v in g.items() if k in ("lr", "betas", "momentum")} for g in engine.param_groups],
    }  # fmt: skip


def survive(
    kind: str, base: str, before: int, after: int, dead: Sequence[int], planned: bool = False, nodes: int = 0,
    fp64: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Train 4 steps on `before` ranks with a mirror; `dead` lose all; go on at `after` ranks, newcomers last.

    Ranks whose number is >= `before` are newcomers; so are the dead, if they are needed.
    """
    dtype = torch.float64 if fp64 else torch.float32
    out: dict[str, Any] = {}
    with reforming() as form:
        me = int(os.environ["LOCAL_RANK"])
        versions = HostVersions(node=f"node{me}")
        old: dict[str, Any] = {}
        if form(range(before)):
            engine = _engine(kind, base, dtype=dtype)
            names = [f"node{r % (nodes or before)}" for r in range(before)]
            mirror = Mirror(dist.new_group(backend="gloo"), me, before, names, 1)
            for step in range(4):
                train(engine, step, step + 1, dtype)
                version = versions.take(engine, generation=1, step=step + 1, extra={"cursor": [step + 1, "a"]})
                mirror.push(version)
                if step == 2:
                    mirror.wait(3, timeout_s=20)
                    versions.commit(1, 3)
                    mirror.commit(3)
            mirror.wait(4, timeout_s=20)
            if planned:
                mirror.hand_over(version, dead)
                dist.barrier()
            old = _state(engine)
            losses = train(engine, 4, 6, dtype)
            out["continued"] = losses
            out["sent"] = mirror.sent_bytes
            versions.adopt(mirror.close())
            tear_down(engine)
            if me in dead:
                versions = HostVersions()
        living = [r for r in range(before) if r not in dead]
        members = [*living, *(r for r in range(WORLD) if r not in living)][:after]
        if form(members):
            group = dist.distributed_c10d._get_default_group()
            engine = _engine(kind, base, seed=7, dtype=dtype)
            found = gather_json(group, inventory(versions))
            chosen = choose(found)
            if chosen is None:
                tear_down(engine)
                return {"lost": True}
            moved = reshard(engine, versions, chosen, found, group)
            new = _state(engine)
            [reference] = [o for o in gather_json(group, old) if o][:1]
            out["equal"] = {name: json.loads(json.dumps(new[name])) == reference[name] for name in reference}
            out["step"], out["extra"] = moved.step, moved.extra
            out["received"], out["local"] = moved.received_bytes, moved.local_bytes
            out["went_on"] = train(engine, 4, 6, dtype)
            versions.drop_older_generations(2)
            assert not versions.held
            tear_down(engine)
    return out


def silent_peer(seconds: float) -> dict[str, Any]:
    """Rank 0 pushes a version that rank 1 never pushes: what the wait says, how long `close` takes, and whether its
    thread lives on."""
    engine = _engine("fsdp2", "momentum")
    train(engine, 0, 1)
    mirror = Mirror(dist.new_group(backend="gloo"), dist.get_rank(), dist.get_world_size(), ["a", "b"], 1)
    out: dict[str, Any] = {}
    versions = HostVersions()
    if dist.get_rank() == 0:
        mirror.push(versions.take(engine, generation=1, step=1, extra={}))
        try:
            mirror.wait(1, timeout_s=seconds)
        except lso.PeerFailed as error:
            out["said"] = str(error)
    dist.barrier()
    start = time.monotonic()
    out |= {"mirrored peers": len(mirror.close()), "close_s": time.monotonic() - start}
    mirror._thread.join(20)  # the cut frees it
    return {**out, "alive": mirror._thread.is_alive()}


def severed_peer() -> dict[str, Any]:
    """Rank 1's sockets are cut after step 1: rank 0's next push or wait raises, its step-1 mirrored peer stays."""
    engine = _engine("fsdp2", "momentum")
    train(engine, 0, 1)
    mirror = Mirror(dist.new_group(backend="gloo"), dist.get_rank(), dist.get_world_size(), ["a", "b"], 1)
    versions = HostVersions()
    mirror.push(versions.take(engine, generation=1, step=1, extra={}))
    mirror.wait(1, timeout_s=10)
    assert mirror.survives_node_loss and mirror.acknowledged == 1
    dist.barrier()
    said = ""
    if dist.get_rank() == 1:
        mirror._transport.sever()
    start = time.monotonic()
    try:
        mirror.push(versions.take(engine, generation=1, step=2, extra={}))
        mirror.wait(2, timeout_s=10)
    except lso.PeerFailed as error:
        said = str(error)
    waited = time.monotonic() - start
    mirrored_peers = [v.step for v in mirror.close()]
    versions.commit(1, 2)  # the first goes, the second is never less than C
    return {"said": said, "waited_s": waited, "mirrored peers": mirrored_peers, "kept": [v.step for v in versions.held]}


def refused_versions() -> dict[str, Any]:
    """No version of perturbed weights, nor before `resync`."""
    engine = _engine("fsdp2", "momentum")
    train(engine, 0, 1)
    versions, said = HostVersions(), []
    space = engine.space
    with space.perturbed(space.weights.clone(), 0.1):
        try:
            versions.take(engine, generation=1, step=1, extra={})
        except lso.StaleWeights as error:
            said.append(str(error))
    space.copies.mark_stale("a test")
    try:
        versions.take(engine, generation=1, step=1, extra={})
    except lso.StaleWeights as error:
        said.append(str(error))
    space.resync()
    return {"said": said, "held": len(versions.held)}


def version_cost(parameters: int, rows: int) -> dict[str, Any]:
    """Milliseconds of `take` and of `push`, medians of 20, for AdamW on `parameters` square matrices of `rows`."""
    from statistics import median

    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(rows, rows, bias=False) for _ in range(parameters)))
    engine = engines.build(
        "fsdp2", model, lso.registry.build("none"), base="adamw", loss_fn=lambda m, b: m(b).square().mean()
    )
    engine.train_batch([torch.randn(2, rows)])
    world = dist.get_world_size()
    mirror = Mirror(dist.new_group(backend="gloo"), dist.get_rank(), world, [str(r) for r in range(world)], 1)
    versions = HostVersions()
    times: dict[str, list[float]] = {"take": [], "push": [], "wait": []}
    for step in range(1, 23):
        at = [time.perf_counter()]
        version = versions.take(engine, generation=1, step=step, extra={"cursor": step})
        at.append(time.perf_counter())
        mirror.push(version)
        at.append(time.perf_counter())
        mirror.wait(step, timeout_s=20)
        at.append(time.perf_counter())
        for name, a, b in zip(times, at, at[1:], strict=False):
            times[name].append((b - a) * 1e3)
        versions.commit(1, step)
        mirror.commit(step)
    mirror.close()
    start = time.perf_counter()
    versions.newest.checksum()
    out = {f"{name}_ms": round(median(values[2:]), 2) for name, values in times.items()}
    return {**out, "checksum_ms": (time.perf_counter() - start) * 1e3, "bytes": version.index.bytes}
