"""One run of a comparison: trained by the product's own engine and loop, on one process or one per replica, measured.

A pure function of the task: settings in, numbers out. It writes nothing.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, replace
from math import inf, isfinite, nan
from typing import Any

import numpy as np

from elastic_lsopt.config.consensus import read_consensus
from elastic_lsopt.config.settings import TrainConfig, landscape_fields
from elastic_lsopt.optimizers import registry
from elastic_lsopt.oracle.method import Method
from elastic_lsopt.probes.catalogue import ProbeContext, measure
from elastic_lsopt.probes.measurement import Measurement
from elastic_lsopt.study.label_noise import wrong_labels
from elastic_lsopt.study.measures import asked
from elastic_lsopt.study.replica_cell import ReplicaOfCell, Together
from elastic_lsopt.training.building.engines import plain_loss_of
from elastic_lsopt.training.datasets.samples import Data, build_data
from elastic_lsopt.training.evaluation import evaluate
from elastic_lsopt.training.loop import TrainingRun, steps_of
from elastic_lsopt.training.probing.during_training import fixed_microbatches
from elastic_lsopt.training.processes import join
from elastic_lsopt.training.reporting.console import Console
from elastic_lsopt.world import World

COUNTED = 20
"""Steps of a trial by which a method's gradients per step are counted."""
IMPORTED_LATE = ("sklearn.datasets", "torch._dynamo", "transformers")
NOT_TRAINED = "the held-out loss is not finite: the run has diverged"
TRAIN_BATCHES = 32
"""Micro-batches of the training samples on which the training loss is taken at the end."""


@dataclass(frozen=True)
class Task:
    """What a worker process is given. `equal` of gradient_evaluations: the job's steps are of one gradient each."""

    id: str
    told: dict[str, Any]
    """What the record calls it."""
    config: TrainConfig
    equal: str
    label_noise: float
    target_loss: float | None
    measures: tuple[str, ...]
    units: int
    evaluated_by: int
    """Samples of a micro-batch that is evaluated or measured: one number for all methods, whatever they train with, as
    `eval_batches` and `units` count micro-batches."""


def processes_of(task: Task) -> int:
    """One, or one per replica."""
    return 1 if task.config.consensus is None else read_consensus(task.config.consensus).replicas


def train_and_measure(task: Task) -> dict[str, Any]:
    """The run's losses, counts and measures; `reason` where it has diverged. Raises what training raises.

    Collective in the task's processes; the first returns the numbers, the others nothing.
    """
    logging.getLogger("elastic_lsopt").setLevel(logging.ERROR)  # of skipped steps: enough of them end the run
    began, config, data, world = time.process_time(), task.config, _data(task), join(processes_of(task))
    name, fields = landscape_fields(config)
    method = registry.build(name, **fields)
    if task.equal == "gradient_evaluations":
        steps = steps_of(config, len(data.train))
        passes = _passes(config, method, data, world, min(COUNTED, steps))
        config = replace(config, max_steps=max(1, round(steps / passes)), num_train_epochs=None)
    return _trained(task, config, method, data, world) | {"cpu_seconds": round(time.process_time() - began, 3)}


def _data(task: Task) -> Data:
    data = build_data(task.config)
    if not task.label_noise:
        return data
    labels = np.asarray(data.train.labels)  # type: ignore[attr-defined]
    # By no run's seed: all runs of one noise level learn the same labels.
    noisy = wrong_labels(labels, len(data.classes), task.label_noise, 0)
    return replace(data, train=type(data.train)(data.train.x, noisy))  # type: ignore[attr-defined,call-arg]


def _run(config: TrainConfig, method: Method, data: Data, world: World) -> TrainingRun:
    if config.consensus is None:
        return TrainingRun(config, method, data, world, Console())
    return ReplicaOfCell(config, method, data, world, Console())


def _passes(config: TrainConfig, method: Method, data: Data, world: World, steps: int) -> float:
    """Gradients of the batch that a step of the method takes, counted over the first steps of a trial: of one process,
    as each replica counts for itself."""
    if config.consensus is not None:
        share = config.global_batch_size // read_consensus(config.consensus).replicas
        config = replace(config, consensus=None, global_batch_size=share)
    run, counted = _run(config, method, data, world), 0
    for _, microbatches in zip(range(steps), run.loader, strict=False):
        counted += run.advance(microbatches)[1].passes
    return max(counted / steps, 1 / steps)


def _trained(task: Task, config: TrainConfig, method: Method, data: Data, world: World) -> dict[str, Any]:
    run = _run(config, method, data, world)
    initial = (
        run.engine.measured()[0].weights.clone()
        if any(measure(n, {}).needs == "initial" for n in task.measures)
        else None
    )
    size = task.evaluated_by
    gradients, skipped, held_out = 0.0, 0, None
    for microbatches in run.steps():
        report = run.advance(microbatches)[1]
        gradients, skipped = gradients + report.passes, skipped + 1 if report.skipped else 0
        if skipped >= config.max_skipped_steps and config.consensus is None:
            break
        if task.target_loss is not None and config.eval_steps and run.engine.clock.steps % config.eval_steps == 0:
            held_out = run.evaluated(size)
            if held_out.loss <= task.target_loss:
                break
            held_out = None
    together: Together | None = None
    if isinstance(run, ReplicaOfCell):
        together = run.together()
        run.become_the_model()
        if not world.speaks:
            return {}
    held_out = held_out or run.evaluated(size)
    part, clock = replace(data, eval=data.train), run.engine.clock
    with run.where_it_is_evaluated():
        first = replace(config, eval_batches=TRAIN_BATCHES, compute_metrics=None)
        train = evaluate(run.engine, part, first, world, microbatch_samples=size)
    reached = task.target_loss is not None and held_out.loss <= task.target_loss
    result: dict[str, Any] = {
        "eval_loss": held_out.loss, "train_loss": train.loss, "steps": clock.steps, "samples": clock.samples,
        "gradient_evaluations": gradients,
        **({} if together is None else {
            "sent_bytes": together.sent_bytes, "consensus_distance": together.consensus_distance,
        }),
        **{f"eval_{name}": value for name, value in held_out.metrics.items()},
        **({"train_accuracy": train.metrics["accuracy"]} if "accuracy" in train.metrics else {}),
        **({} if task.target_loss is None else {
            "steps_to_target": clock.steps if reached else None,
            "samples_to_target": clock.samples if reached else None,
        }),
    }  # fmt: skip
    result = {key: value if isfinite(nan if value is None else value) else None for key, value in result.items()}
    if result["eval_loss"] is None or (together is None and skipped >= config.max_skipped_steps):
        why = NOT_TRAINED if result["eval_loss"] is None else f"{skipped} steps in a row were skipped: it has diverged"
        return result | {"measures": dict.fromkeys(task.measures), "reasons": {}, "reason": why}
    return result | {"reason": None} | _measured(task, config, data, world, run, initial)


def _measured(task: Task, config: TrainConfig, data: Data, world: World, run: TrainingRun, initial: Any) -> Any:
    """The flatness measures where the model is evaluated, on fixed training samples, as a job's probe sees them."""
    if not task.measures:
        return {"measures": {}, "reasons": {}, "measure_seconds": {}}
    engine, (space, backend) = run.engine, run.engine.measured()
    # The same samples for all seeds.
    together, single = fixed_microbatches(
        data, replace(config, seed=0), world, task.units, microbatch_samples=task.evaluated_by
    )
    measuring = Measurement(space, backend, plain_loss_of(config, engine.module))
    with run.where_it_is_evaluated():
        with measuring.at_rest():
            oracle = measuring.oracle(together, engine.clock)
        context = ProbeContext(
            space=space, oracle=oracle, samples=len(data.train), initial=initial,
            batches=lambda: [measuring.oracle(single(i), engine.clock, checked=False) for i in range(task.units)],
        )  # fmt: skip
        try:
            return asked(measuring, task.measures, context)
        finally:
            measuring.done_with(oracle)


def rank_of(result: dict[str, Any] | None) -> tuple[float, float]:
    """How a run is held against others when a grid is tuned, the smaller the better: steps to the target, then loss."""
    if result is None:  # it raised, or took too long
        return inf, inf

    def or_last(key: str) -> float:
        value = result.get(key)
        return inf if value is None else float(value)

    return (or_last("steps_to_target") if "steps_to_target" in result else 0.0), or_last("eval_loss")
