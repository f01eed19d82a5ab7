"""The training loop, top to bottom: data, engine, checkpoint, steps, evaluation, export.

[Note: ending on a signal] SIGTERM and Ctrl-C only set a flag. It travels in the all-reduce that ends a pass, so all
ranks see it after the same step; they save, and leave. Nothing is interrupted inside a pass, where weights may be
displaced.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elastic_lsopt.checkpoint.checkpointer import Checkpointer
from elastic_lsopt.config.settings import TrainConfig
from elastic_lsopt.elastic.loader import StepLoader
from elastic_lsopt.errors import UserError
from elastic_lsopt.faces.engine import Engine
from elastic_lsopt.faces.report import StepReport
from elastic_lsopt.optimizers.registry import Method
from elastic_lsopt.oracle.units import Unit
from elastic_lsopt.schedules.learning_rate import LearningRate
from elastic_lsopt.training.console import Console
from elastic_lsopt.training.data import Data, build_data
from elastic_lsopt.training.engines import build_engine
from elastic_lsopt.training.result import finish, say_unsaved
from elastic_lsopt.training.run_folder import RunFolder
from elastic_lsopt.training.world import World

EVAL_UNITS_AT_ONCE = 8
"""Units of a rank in memory during an evaluation."""


@dataclass(frozen=True)
class Outcome:
    """How a job ended."""

    step: int
    eval_loss: float | None
    """The last held-out loss of this process's life, nats a token or a sample; None where there was none."""
    stopped: bool
    """By a signal, after a checkpoint; the same command goes on from there."""


def train(config: TrainConfig, method: Method, world: World) -> Outcome:
    """Run the job on this rank (collective). Raises UserError for whatever the user can mend."""
    data = build_data(config)
    steps = _steps(config, len(data.train))
    total_samples = steps * config.global_batch_size
    engine = build_engine(config, method, data, world, total_samples)
    loader = StepLoader(
        data.train, lambda rows: _placed(data.collate(rows), world), global_batch_size=config.global_batch_size,
        unit_size=config.per_device_train_batch_size, seed=config.seed, rank=world.rank, world=world.size, steps=steps,
    )  # fmt: skip
    folder = world.on_first(lambda: RunFolder(config))
    console = Console(world.is_first, steps)
    checkpoints = Checkpointer(Path(config.output_dir) / "checkpoints", save_total_limit=config.save_total_limit)
    _resume(config, engine, loader, checkpoints, console)
    console.start(config, engine, data)
    rate = LearningRate(peak=config.learning_rate, shape=config.lr_scheduler_type, warmup=config.warmup_ratio)

    eval_loss, stopped = None, False
    with _stopping_on_signals(engine), console:
        for units in loader:
            start = time.monotonic()
            lr = rate.at(engine.clock)
            for group in engine.param_groups:
                group["lr"] = lr
            engine.train_batch(units)
            loader.commit(config.global_batch_size)
            report, step, last = engine.last_step, engine.clock.steps, engine.clock.samples >= total_samples
            assert report is not None
            row = {
                "generation": 0, "step": step, "samples": engine.clock.samples, "loss": report.loss, "lr": lr,
                "batch": config.global_batch_size, "world": world.size, "seconds": time.monotonic() - start,
                **_told(report),
            }  # fmt: skip
            if len(data.eval) and (last or _due(step, config.eval_steps)):
                row["eval_loss"] = eval_loss = evaluate(engine, data, config, world)
            if folder is not None:
                folder.write(row)
            console.step(row)
            stopped = report.stop and not last
            if last or stopped or _due(step, config.save_steps):
                checkpoints.save(engine, step, extra={"loader": loader.state_dict()})
            if stopped:
                break
        saved = checkpoints.wait()
    checkpoints.close()
    if folder is not None:
        folder.close()
    if stopped:
        console.say(f"stopped after step {engine.clock.steps} of {steps}; the same command goes on from there.")
    else:
        finish(config, engine, data, console, is_first=world.is_first)
    say_unsaved(saved, checkpoints.folder, console)
    return Outcome(engine.clock.steps, eval_loss, stopped)


def evaluate(engine: Engine, data: Data, config: TrainConfig, world: World) -> float:
    """The mean held-out loss, over `eval_batches` units or all (collective)."""
    size = config.per_device_train_batch_size
    firsts = list(range(0, len(data.eval), size))[: config.eval_batches]

    def unit(i: int, number: int, idle: bool = False) -> Unit:
        rows = [data.eval[j] for j in range(firsts[i], min(firsts[i] + size, len(data.eval)))]
        return Unit(number, _placed(data.collate(rows), world), idle)

    def rounds() -> Iterator[list[Unit]]:
        at_once = EVAL_UNITS_AT_ONCE * world.size
        for begin in range(0, len(firsts), at_once):
            count = min(at_once, len(firsts) - begin)
            mine = [unit(begin + k, k) for k in range(world.rank, count, world.size)]
            yield mine or [unit(begin, 0, idle=True)]

    return engine.evaluate(rounds())


def _resume(
    config: TrainConfig, engine: Engine, loader: StepLoader, checkpoints: Checkpointer, console: Console
) -> None:
    # The settings say what the optimizer's hyper-parameters are: a weight_decay that the user has changed counts.
    found = checkpoints.resume(engine, config.resume_from_checkpoint, hyperparameters=False)
    if found is None:
        return
    if "loader" not in found.extra:
        raise UserError(
            f"resume_from_checkpoint: {found.path} was not saved by `elastic-lsopt train` (it has no place in the "
            "data); give one that was, or none."
        )
    loader.load_state_dict(found.extra["loader"])
    console.say(f"resumed from {found.path}, after step {engine.clock.steps}")


def _steps(config: TrainConfig, samples: int) -> int:
    if config.max_steps is not None:
        return config.max_steps
    assert config.num_train_epochs is not None
    steps = round(config.num_train_epochs * samples / config.global_batch_size)
    if steps < 1:
        raise UserError(
            f"num_train_epochs={config.num_train_epochs} of {samples} samples is less than one step of "
            f"global_batch_size={config.global_batch_size}; train longer or lower the batch."
        )
    return steps


def _told(report: StepReport) -> dict[str, Any]:
    """What the method reports of a step, beside its loss."""
    told: dict[str, Any] = {
        "passes": report.passes, "gradient_norm": report.gradient_norm, "skipped": report.skipped,
    }  # fmt: skip
    if report.fidelity is not None:
        told |= {"fidelity_cosine": report.fidelity.cosine, "fidelity_norm_ratio": report.fidelity.norm_ratio}
    return told


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _placed(batch: dict[str, Any], world: World) -> dict[str, Any]:
    return batch if world.device.type == "cpu" else {k: v.to(world.device, non_blocking=True) for k, v in batch.items()}


@contextmanager
def _stopping_on_signals(engine: Engine) -> Iterator[None]:
    """See [Note: ending on a signal]."""
    before = {s: signal.signal(s, lambda *_: engine.request_stop()) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
