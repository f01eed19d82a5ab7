"""A YAML file's job with an `elastic:` block: what its workers build, what its agents are told."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import NoReturn

from elastic_lsopt.config.settings import TrainConfig
from elastic_lsopt.elastic.agent.roles import fingerprint_of, serve, work
from elastic_lsopt.elastic.worker.journal import Journal
from elastic_lsopt.oracle.method import Method
from elastic_lsopt.plan import Policy
from elastic_lsopt.training.datasets.samples import build_data
from elastic_lsopt.training.estimate.replicas import one_replica, replicas_of
from elastic_lsopt.training.loop import TrainingRun
from elastic_lsopt.training.pace import gain_monitor
from elastic_lsopt.training.reporting.console import Console
from elastic_lsopt.training.train import run_of
from elastic_lsopt.world import World, on_gpu

PER_NODE = (
    "workers",
    "output_dir",
    "dataset_cache_dir",
    "elastic.address",
    "elastic.preemption_notice_file",
    "elastic.secret_file",
    "elastic.event_log",
)
"""Settings in which nodes may differ."""


def run_worker(config: TrainConfig, method: Method) -> NoReturn:
    """This process is a worker: train until the job ends or this worker leaves it; does not return on a failure."""
    assert config.elastic is not None
    data, console = build_data(config), Console()  # once a process: a change of members reads no corpus again

    policy = Policy.of(one_replica(config), parts=method.parts)
    keep = [gain_monitor(config)] if policy.rule == "adascale" else []

    def build(world: World) -> TrainingRun:
        return run_of(config)(rehearsed(config) if world.rehearsal else config, method, data, world, console, keep)

    work(build, config.elastic, policy, Journal(Path(config.output_dir), console.say))


def rehearsed(config: TrainConfig) -> TrainConfig:
    """What a worker builds to warm up: the job's own, but for DeepSpeed on a GPU, which would put the model there."""
    if config.backend != "deepspeed" or not on_gpu():
        return config
    import elastic_lsopt.backends.zero.start  # noqa: F401  (what takes the time)

    return replace(config, backend="replicated", deepspeed=None)


def run_agent(config: TrainConfig, arguments: Sequence[str]) -> NoReturn:
    """This process is the agent of its node, whose workers it starts with the same `arguments`."""
    assert config.elastic is not None
    told = {k: v for k, v in asdict(config).items() if k != "elastic"}
    told |= {f"elastic.{k}": v for k, v in asdict(config.elastic).items()}
    serve(
        config.elastic, Path(config.output_dir), workers=config.workers,
        command=[sys.executable, "-m", "elastic_lsopt.train", *arguments],
        fingerprint=fingerprint_of({k: v for k, v in told.items() if k not in PER_NODE}),
        exit_code_when_stopped=config.exit_code_when_stopped, replicas=replicas_of(config),
    )  # fmt: skip
