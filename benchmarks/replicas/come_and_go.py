"""Replicas that are killed and come back by a seeded schedule: the final model, beside that of the undisturbed run.

    python -m benchmarks.replicas.come_and_go docs/evidence/consensus-come-and-go.csv

A perceptron on handwritten digits, four replicas of one process each that meet every 16 steps. The run is cut into
EVENTS parts; in each of them one replica, drawn with the seed, is killed (SIGKILL, after a step) at a drawn step, and a
new process takes its place as soon as the others have come to a drawn later one. It begins without anything: at its
first exchange the others give it the model. All runs of a seed train on the same samples in all, each counted once.
"""

from __future__ import annotations

import csv
import json
import multiprocessing
import os
import random
import signal
import sys
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist

from elastic_lsopt.api.replicas.exchanged import Exchanged
from elastic_lsopt.backends.groups import form_replicas
from elastic_lsopt.config.settings import TrainConfig
from elastic_lsopt.optimizers import registry
from elastic_lsopt.oracle.step_report import StepReport
from elastic_lsopt.study.interval import interval
from elastic_lsopt.training.datasets.samples import build_data
from elastic_lsopt.training.processes import host
from elastic_lsopt.training.replica_run import ReplicaRun
from elastic_lsopt.training.reporting.console import Console
from elastic_lsopt.world import World

REPLICAS, TAU, EVENTS = 4, 16, 8
SEEDS = range(5)
RULES: dict[str, dict[str, Any]] = {"mgrawa": {"learning_rate": 0.1}, "easgd": {"learning_rate": 0.1}}
JOB: dict[str, Any] = {
    "task": "classification", "dataset": "digits", "eval_fraction": 0.5,
    "model": {"import": "elastic_lsopt.training.classifiers:mlp", "args": {"inputs": 64, "hidden": 128, "classes": 10}},
    "global_batch_size": 64, "per_device_train_batch_size": 16, "max_steps": 512, "optim": "sgd", "momentum": 0.9,
    "optim_args": {"nesterov": True}, "lr_scheduler_type": "cosine", "max_grad_norm": 0, "weight_decay": 5e-4,
}  # fmt: skip
TIMEOUT_S, LOOK_EVERY_S, LIMIT_S, LATE_S = 8.0, 0.02, 600.0, 10.0
INSIDE = timedelta(minutes=5)


@dataclass(frozen=True)
class Leave:
    """A replica is killed after this step of the job, and comes back at that one."""

    replica: int
    step: int
    back: int


def schedule(seed: int, steps: int) -> list[Leave]:
    """One in each of the parts: in its first half; back after a quarter to a half of it."""
    draw, part = random.Random(seed), steps // EVENTS
    leaves = []
    for k in range(EVENTS):
        step = k * part + draw.randint(1, part // 2)
        leaves.append(Leave(draw.randrange(REPLICAS), step, step + draw.randint(part // 4, part // 2)))
    return leaves


class Seen(ReplicaRun):
    """A replica without a folder, which tells of its exchanges and dies when it is to."""

    dies_at: int | None = None

    def advance(self, microbatches: Any) -> tuple[float, StepReport]:
        done = super().advance(microbatches)
        self._tell()
        if self.dies_at is not None and self.engine.clock.samples >= self.dies_at * self._job.global_batch_size:
            os.kill(os.getpid(), signal.SIGKILL)
        return done

    def _tell(self) -> Exchanged | None:
        told = super()._tell()
        if told is not None:
            said = {"members": told.members, "fit": told.fit, "well": told.well, "samples": self.engine.clock.samples}
            self.world.store.set(f"exchange/{told.number}", json.dumps(said))
            self.world.store.set("exchanges", str(told.number + 1))
        return told

    def _save(self) -> None:
        """It leaves nothing."""


def replica(job: dict[str, Any], number: int, life: int, dies_at: int | None, place: dict[str, str], out: str) -> None:
    """One life of a replica; the first of those at the end writes the numbers."""
    os.environ.update(place, RANK=str(number), LOCAL_RANK="0")
    torch.set_num_threads(1)
    store = dist.TCPStore(place["MASTER_ADDR"], int(place["MASTER_PORT"]), is_master=False)
    sizes = [1] * REPLICAS
    form_replicas(dist.PrefixStore(f"life/{number}/{life}", store), number, sizes, INSIDE, apart=True)
    meetings = dist.PrefixStore("meetings", store)
    world = World(
        0, 1, torch.device("cpu"), store, replica=number, sizes=tuple(sizes), meetings=meetings, newcomer=life > 0
    )
    config = TrainConfig(**job)
    run = Seen(config, registry.build("none"), build_data(config), world, Console())
    run.dies_at = dies_at
    for microbatches in run.steps():
        run.advance(microbatches)
    if run._consensus_of.over:  # the others have ended without it
        return
    run.become_the_model()
    run._consensus_of.conclude()
    if run._consensus_of.leads:
        found = run.evaluated()
        new = Path(f"{out}.new")
        new.write_text(json.dumps({"eval_loss": found.loss, "eval_accuracy": found.metrics["accuracy"]}))
        new.rename(out)


def one_run(job: dict[str, Any], leaves: list[Leave]) -> dict[str, Any]:
    """Its numbers. Raises RuntimeError where a replica fails that was not killed, or the run does not end."""
    context, begin = multiprocessing.get_context("forkserver"), time.monotonic()
    context.set_forkserver_preload(["elastic_lsopt.training.replica_run", "sklearn.datasets", "torch._dynamo"])
    store, place = host(REPLICAS)
    with TemporaryDirectory(prefix="come-and-go-") as folder:
        out = str(Path(folder) / "numbers.json")
        waiting = {r: [leave for leave in leaves if leave.replica == r] for r in range(REPLICAS)}
        lives = dict.fromkeys(range(REPLICAS), 0)

        def start(number: int) -> Any:
            own = waiting[number]
            dies_at = own[0].step if own else None
            process = context.Process(target=replica, args=(job, number, lives[number], dies_at, place, out))
            process.start()
            lives[number] += 1
            return process

        running, away = {r: start(r) for r in range(REPLICAS)}, dict[int, int]()
        while not Path(out).exists():
            if time.monotonic() - begin > LIMIT_S:
                raise RuntimeError(f"the run has not ended in {LIMIT_S:g} s: {job}, {leaves}")
            for number, process in [*running.items()]:
                if process.exitcode == -signal.SIGKILL and waiting[number]:
                    away[number] = waiting[number].pop(0).back
                    del running[number]
                elif process.exitcode:
                    raise RuntimeError(f"replica {number} ended with {process.exitcode}: {job}, {leaves}")
            now = max((each["samples"] for each in exchanges(store)), default=0) // job["global_batch_size"]
            for number in [number for number, back in away.items() if now >= back]:
                del away[number]
                running[number] = start(number)
            time.sleep(LOOK_EVERY_S)
        for process in running.values():  # one that has come too late hears that it has
            process.join(LATE_S)
            process.kill()
            process.join()
        numbers, told = json.loads(Path(out).read_text()), exchanges(store)
    well = [each for each in told if each["well"]]
    return numbers | {
        "killed": sum(lives.values()) - REPLICAS + len(away), "given_the_model": sum(
            len(each["members"]) - len(each["fit"]) for each in well
        ), "exchanges": len(told), "exchanges_not_well": len(told) - len(well),
        "members": fmean(len(each["fit"]) for each in well), "seconds": round(time.monotonic() - begin, 1),
    }  # fmt: skip


def exchanges(store: dist.Store) -> list[dict[str, Any]]:
    """What the replicas have told of each so far."""
    count = int(store.get("exchanges")) if store.check(["exchanges"]) else 0
    keys = [f"exchange/{number}" for number in range(count)]
    return [json.loads(store.get(key)) for key in keys if store.check([key])]


def main(target: str, seeds: int = len(SEEDS)) -> None:
    lines = []
    for rule, own in RULES.items():
        for seed in range(seeds):
            block = {"rule": rule, "replicas": REPLICAS, "tau": TAU, "exchange_timeout_s": TIMEOUT_S}
            job = {**JOB, **own, "seed": seed, "output_dir": "-", "backend": "replicated", "consensus": block}
            for disturbed in (False, True):
                leaves = schedule(seed, job["max_steps"]) if disturbed else []
                lines.append({"rule": rule, "seed": seed, "disturbed": disturbed, **one_run(job, leaves)})
                print(lines[-1], flush=True)
    with Path(target).open("w", newline="") as file:
        writer = csv.DictWriter(file, [*lines[0]], lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
    for rule in RULES:
        for disturbed in (False, True):
            mine = [line for line in lines if (line["rule"], line["disturbed"]) == (rule, disturbed)]
            said = {name: interval([line[name] for line in mine]) for name in ("eval_loss", "eval_accuracy")}
            print(rule, disturbed, {name: f"{found.mean:.4f} ± {found.half:.4f}" for name, found in said.items()})


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
