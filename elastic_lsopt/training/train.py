"""The job of a YAML file, top to bottom: data, engine, checkpoint, steps, evaluation, export."""

from __future__ import annotations

from dataclasses import dataclass

from elastic_lsopt.config.settings import TrainConfig
from elastic_lsopt.oracle.method import Method
from elastic_lsopt.training.datasets.samples import build_data
from elastic_lsopt.training.loop import TrainingRun
from elastic_lsopt.training.replica_run import ReplicaRun
from elastic_lsopt.training.reporting.console import Console
from elastic_lsopt.training.stopping import stopping_on_signals
from elastic_lsopt.world import World


@dataclass(frozen=True)
class Outcome:
    """How a job ended."""

    step: int
    eval_loss: float | None
    """The last held-out loss of this process's life, nats a token or a sample; None where there was none."""
    stopped: bool
    """By a signal, after a checkpoint; the same command goes on from there."""


def train(config: TrainConfig, method: Method, world: World) -> Outcome:
    """Run the job on this rank (collective). Raises UserError for whatever the user can mend, Diverged among them."""
    run = run_of(config)(config, method, build_data(config), world, Console())
    try:
        with stopping_on_signals(run.engine), run.console:
            run.resume()
            for microbatches in run.steps():
                run.step(microbatches)
                if run.stopped:
                    break
        run.finish()
    except BaseException as error:
        run.fail(error)
        raise
    return Outcome(run.engine.clock.steps, run.eval_loss, run.stopped)


def run_of(config: TrainConfig) -> type[TrainingRun]:
    """What runs the job: one model, or a replica among others."""
    return TrainingRun if config.consensus is None else ReplicaRun
