"""Whole jobs inside ranks that are there already, which costs no start-up."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from elastic_lsopt.cli.job_file import read_job
from elastic_lsopt.errors import UserError
from elastic_lsopt.oracle.clock import SampleClock
from elastic_lsopt.plan import Policy, Worker, plan
from elastic_lsopt.training.building.engines import build_engine
from elastic_lsopt.training.building.models import build_model
from elastic_lsopt.training.datasets.samples import build_data
from elastic_lsopt.training.evaluation import evaluate
from elastic_lsopt.training.loop import TrainingRun
from elastic_lsopt.training.reporting.console import Console
from elastic_lsopt.training.train import run_of, train
from elastic_lsopt.world import World


def this_world() -> World:
    store = dist.distributed_c10d._get_default_store()
    return World(dist.get_rank(), dist.get_world_size(), torch.device("cpu"), store)


def job(path: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Run the job of a YAML file; how it ended."""
    found = read_job(path, overrides)
    with found.file.located():
        outcome = train(found.config, found.method, this_world())
    return {"step": outcome.step, "eval_loss": outcome.eval_loss, "stopped": outcome.stopped}


def refused(path: str, overrides: Sequence[str] = ()) -> str:
    """What the job of a YAML file is refused with."""
    try:
        job(path, overrides)
    except UserError as error:
        return str(error)
    raise AssertionError("the job was not refused")


def spoilt(path: str) -> str:
    """What a job ends with whose export somebody's file is in the way of, put there while it trains."""
    found = read_job(path)
    run = run_of(found.config)(found.config, found.method, build_data(found.config), this_world(), Console())
    with run.console:
        run.resume()
        for microbatches in run.steps():
            run.step(microbatches)
    if dist.get_rank() == 0:
        foreign = Path(found.config.output_dir) / "model"
        foreign.mkdir()
        (foreign / "thesis.tex").touch()
    try:
        run.finish()
    except UserError as error:
        run.fail(error)
        return str(error)
    return "nothing"


def evaluation(path: str) -> tuple[float, float]:
    """(held-out loss in rounds over all ranks, the same by a plain loop over the samples on a whole model)."""
    found = read_job(path)
    data = build_data(found.config)
    engine = build_engine(found.config, found.method, data, this_world(), total_samples=100)
    model = build_model(found.config).eval()
    total, targets = 0.0, 0
    units = found.config.eval_batches or len(data.eval)
    for i in range(min(len(data.eval), units * found.config.per_device_train_batch_size)):
        ids = torch.from_numpy(data.eval[i].astype("int64"))
        with torch.no_grad():
            logits = model(ids[None]).logits[0]
        total += float(torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="sum"))
        targets += len(ids) - 1
    return evaluate(engine, data, found.config, this_world()).loss, total / targets


def decayed(path: str) -> list[tuple[float, list[str]]]:
    """Each param group's weight decay and the names of its parameters."""
    found = read_job(path)
    data = build_data(found.config)
    engine = build_engine(found.config, found.method, data, this_world(), total_samples=100)
    names = {id(p): n for n, p in engine.module.named_parameters()}
    return [(g["weight_decay"], sorted(names[id(p)] for p in g["params"])) for g in engine.param_groups]


def told_by_first(fails: bool) -> str:
    """What `on_first` gives on this rank, or raises."""

    def act() -> str:
        if fails:
            raise UserError("the folder is märchenhaft")
        return "done"

    try:
        return str(this_world().on_first(act))
    except UserError as error:
        return f"refused: {error}"


def last_words(silent: int, limit_s: float) -> float:
    """Seconds until this rank, which has said what it had to, may leave; rank 2 needs a second for it."""
    world = replace(this_world(), store=dist.PrefixStore(f"last words {silent}", this_world().store))
    begin = time.monotonic()
    dist.barrier()
    if world.rank == 2:
        time.sleep(1.0)
    if world.rank != silent:
        world.wait_for_the_others_words(limit_s)
    return time.monotonic() - begin


def first_failures() -> list[str]:
    """What each rank learns is the first failure when rank 1 is first."""
    world = replace(this_world(), store=dist.PrefixStore("a test's own", this_world().store))
    if world.rank == 1:
        world.first_failure("of rank 1")
    dist.barrier()
    return [world.first_failure(f"of rank {world.rank}")]


def rehearsal(path: str) -> dict[str, Any]:
    """What an elastic job's worker builds to warm up, before it has a world: the hyper-parameters of its plan."""
    found = read_job(path)
    policy = Policy.of(found.config, parts=found.method.parts)
    alone = plan([Worker(0, "")], policy, SampleClock())
    world = World(0, 1, torch.device("cpu"), dist.HashStore(), 0, alone, rehearsal=True)
    run = TrainingRun(found.config, found.method, build_data(found.config), world, Console())
    run.abandon()
    return {"rule": alone.rule, "families": sorted(run.engine.families)}
