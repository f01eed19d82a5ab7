"""Replicas at the edges of a job: started again, without samples, late for the end; what each has then."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

import elastic_lsopt as lso
from elastic_lsopt.api.engine import Engine
from elastic_lsopt.api.replicas.consensus import Consensus
from elastic_lsopt.backends.groups import form_replicas
from elastic_lsopt.backends.rebuild import tear_down
from elastic_lsopt.consensus import registry
from elastic_lsopt.consensus.rule import FAMILY
from tests.cases import engines
from tests.cases.laws import DTYPES
from tests.cases.replicas import away

Made = Callable[..., tuple[Engine, Consensus]]
WAIT_S = 20.0


@contextmanager
def replicas_of_one() -> Iterator[tuple[dist.Store, Made]]:
    """A store, and what makes this rank's replica in a life of the job of that name."""
    rank, size, built = dist.get_rank(), dist.get_world_size(), list[Engine]()
    with away() as fresh:
        store = fresh()
        form_replicas(dist.PrefixStore("groups", store), rank, [1] * size, timedelta(seconds=30), apart=True)

        def made(life: str, rule: str, timeout_s: float = WAIT_S) -> tuple[Engine, Consensus]:
            consensus = Consensus(
                registry.build(rule, tau=1000), dist.PrefixStore(life, store), replicas=tuple(range(size)),
                timeout_s=timeout_s,
            )  # fmt: skip
            model = engines.net((), DTYPES["fp64"])
            built.append(engines.build("ddp", model, lso.Plain(), consensus=consensus))
            return built[-1], consensus

        yield store, made
        for engine in built:
            engines.close(engine)
        tear_down(built[-1])


def together(store: dist.Store, key: str, count: int) -> None:
    """Wait until so many ranks have come here."""
    store.add(key, 1)
    while store.add(key, 0) < count:
        time.sleep(0.01)


def moved(engine: Engine, by: float) -> None:
    for w in engine.space.weights.tensors:
        w.add_(by)
    engine.space.copies.refresh()


def flat(vector: Any) -> list[float]:
    return torch.cat([t.double() for t in vector.tensors]).tolist()


def started_again() -> dict[str, Any]:
    """The last replica is late for the first exchange of a job that has been started again, and at the next: the
    weights and the centre of each before it, and after it."""
    rank, size = dist.get_rank(), dist.get_world_size()
    with replicas_of_one() as (store, made):
        engine, consensus = made("first life", "easgd")
        for _ in range(3):
            moved(engine, 0.1 * rank)
            consensus.exchange(None)
        saved, weights = engine.state_dict(), engine.space.weights.clone()
        engine, consensus = made("second life", "easgd", timeout_s=3.0)
        engine.load_state_dict(saved)
        for mine, kept in zip(engine.space.weights.tensors, weights.tensors, strict=True):
            mine.copy_(kept)
        moved(engine, 0.1 * (rank + 1))
        together(store, "built", size)
        if rank < size - 1:
            consensus.exchange(None)
        together(store, "met", size)
        state = engine.families[FAMILY].state_dict()
        before = {"x": flat(engine.space.weights), "centre": flat(state["centre"])}
        said = [f"1/ready/{size - 1}"]
        while rank < size - 1 and not dist.PrefixStore("second life", store).check(said):
            time.sleep(0.01)  # these two wait for nobody else: the third is to be there when they come
        consensus.exchange(None)
        after = flat(engine.families[FAMILY].state_dict()["centre"])
        told = [(list(e.members), e.well) for e in consensus.exchanges]
    return {**before, "after": after, "told": told}


def at_the_end() -> dict[str, Any]:
    """Replica 1 has no samples for an exchange; it has lost its numbers when the model is formed; and it comes for an
    exchange when the other comes for the model."""
    rank, step = dist.get_rank(), engines.batches(1, 1, dtype=DTYPES["fp64"])[0]
    with replicas_of_one() as (_, made):
        engine, consensus = made("job", "mgrawa")
        moved(engine, 0.1 * rank)
        told = consensus.exchange(None if rank else engine.oracle(step))
        out: dict[str, Any] = {"well": told is not None and told.well, "x": flat(engine.space.weights)}
        if rank:
            engine.space.weights.mul_(float("nan"))
        out["lost"] = flat(consensus.point())
        engine.space.weights.mul_(0.0)
        moved(engine, 1.0 + rank)
        if rank:
            consensus.exchange(None)
        out["late"] = flat(engine.space.weights if rank else consensus.point())
    return out


def other_terms() -> list[tuple[str, list[str]]]:
    """What each replica hears where the second has another rule, hyper-parameter, format, or a frozen parameter."""
    rank, out = dist.get_rank(), list[tuple[str, list[str]]]()
    with replicas_of_one() as (store, made):
        made("group", "local_sgd")  # whose engine the end takes down
        for kind in ("rule", "hyper-parameter", "format", "frozen"):
            other = kind if rank else ""
            rule = registry.build(
                "easgd" if other == "rule" else "local_sgd",
                tau=1000, **({} if other == "rule" else {"pull": 0.9 if other == "hyper-parameter" else 0.5}),
            )  # fmt: skip
            consensus = Consensus(
                rule, dist.PrefixStore(kind, store), replicas=(0, 1), timeout_s=WAIT_S,
                bits=8 if other == "format" else 32,
            )  # fmt: skip
            model = engines.net((), DTYPES["fp64"])
            if other == "frozen":
                model.tiny.requires_grad_(False)
            engine = engines.build("ddp", model, lso.Plain(), consensus=consensus)
            try:
                consensus.exchange(None)
                out.append((kind, ["nothing"]))
            except Exception as error:
                out.append((kind, [type(error).__name__, str(error)]))
            engines.close(engine)
    return out


def other_beginnings() -> list[list[str]]:
    """What is said at the first exchange where both have begun alike, and where they have not."""
    rank, out = dist.get_rank(), list[list[str]]()
    with replicas_of_one() as (store, made):
        made("group", "local_sgd")
        for kind in ("alike", "apart"):
            consensus = Consensus(
                registry.build("local_sgd", tau=1000), dist.PrefixStore(kind, store), replicas=(0, 1), timeout_s=WAIT_S
            )
            model = engines.net((), DTYPES["fp64"])
            with torch.no_grad():
                model.first.weight.mul_(1.0 + rank * (kind == "apart"))
            engine = engines.build("ddp", model, lso.Plain(), consensus=consensus)
            moved(engine, 0.1 * rank)  # steps of its own
            lines = list[str]()
            handler = logging.Handler()
            handler.emit = lambda record, lines=lines: lines.append(record.getMessage())  # type: ignore[method-assign]
            logging.getLogger("elastic_lsopt").addHandler(handler)
            consensus.exchange(None)
            logging.getLogger("elastic_lsopt").removeHandler(handler)
            out.append(lines)
            engines.close(engine)
    return out
