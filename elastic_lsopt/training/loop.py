"""What runs a job: the engine, its data, and all that belongs to a step, from the checkpoint to the exported model."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch.distributed as dist

from elastic_lsopt.api.refusals import refuse_halves
from elastic_lsopt.api.replicas.consensus import Consensus
from elastic_lsopt.checkpoint.checkpointer import Checkpointer, LoadReport, SaveReport
from elastic_lsopt.checkpoint.divergence import Streak, last_words, set_bad_aside
from elastic_lsopt.checkpoint.folder import listing
from elastic_lsopt.checkpoint.ownership import Ownership
from elastic_lsopt.config.settings import TrainConfig
from elastic_lsopt.data.loader import StepLoader
from elastic_lsopt.elastic.worker.journal import Journal, Rewind
from elastic_lsopt.elastic.worker.same_data import Identity, refuse_other_data
from elastic_lsopt.errors import Diverged, UserError
from elastic_lsopt.oracle.family import Stateful
from elastic_lsopt.oracle.method import Method
from elastic_lsopt.oracle.microbatch import MicroBatch
from elastic_lsopt.oracle.step_report import StepReport
from elastic_lsopt.training.building.engines import build_engine
from elastic_lsopt.training.building.models import identity_of_base
from elastic_lsopt.training.datasets.samples import Data
from elastic_lsopt.training.evaluation import Evaluation, evaluate, placed
from elastic_lsopt.training.pace import Pace, watchers
from elastic_lsopt.training.probing.during_training import Probing
from elastic_lsopt.training.reporting.console import Console
from elastic_lsopt.training.reporting.quiet import report_loads
from elastic_lsopt.training.reporting.result import finish, refuse_foreign, say_stopped, say_what_is_missing
from elastic_lsopt.training.reporting.run_folder import CHECKPOINTS, RunFolder, unwritable
from elastic_lsopt.training.reporting.run_state import State
from elastic_lsopt.world import World


class TrainingRun:
    """The job of a YAML file in one world: the engine, its data, and all that belongs to a step (collective).

    In an elastic job one is made for each generation, and filled from memory instead of by `resume`.
    """

    def __init__(
        self, config: TrainConfig, method: Method, data: Data, world: World, console: Console,
        keep: Sequence[Stateful] = (),
    ) -> None:  # fmt: skip
        self.config, self.data, self.world, self.console = config, data, world, console
        console.lead(world.speaks)
        report_loads(world.speaks and (world.plan is None or world.generation == 1))
        if world.plan is None and world.size > 1:
            assert dist.group.WORLD is not None
            refuse_other_data(dist.group.WORLD, self.data_identity())
        self.total_samples = steps_of(config, len(data.train)) * config.global_batch_size
        keep = [*keep, *watchers(config, len(data.train))]
        if world.plan is not None:
            refuse_halves(method)
        self.engine = build_engine(config, method, data, world, self.total_samples, keep, self._consensus())
        self._pace = Pace(config, self.engine, world.plan, rehearsal=world.rehearsal)
        self.loader = self._loader()
        self.stopped, self.eval_loss = False, None
        self._exports = config.export  # else the job's result is its last checkpoint
        self._probing = Probing(config, self.engine, data, world) if config.probes else None
        self._checkpoints: Checkpointer | None = None
        self._folder: RunFolder | None = None
        self._owner: Ownership | None = None
        self._streak, self._save_due = Streak(), False

    def _consensus(self) -> Consensus | None:
        """How the engine and others pull on each other."""
        return None

    def _loader(self) -> StepLoader:
        plan, batch = self.world.plan, self.config.global_batch_size
        return StepLoader(
            self.data.train, self.collate, global_batch_size=batch if plan is None else plan.global_batch_size,
            microbatches=None if plan is None else plan.microbatches_of_rank[self.world.rank],
            batch_at=self._pace.batch_at, **self.how_to_load(),
        )  # fmt: skip

    def collate(self, rows: list[Any]) -> Any:
        return placed(self.data.collate(rows), self.world)

    def how_to_load(self) -> dict[str, Any]:
        """What of a loader does not depend on the batch."""
        rank, ranks = self.engine.deal
        return {
            "microbatch_size": self.config.per_device_train_batch_size, "seed": self.config.seed, "rank": rank,
            "world": ranks, "total_samples": self.total_samples, "parts": self.engine.method.parts,
        }  # fmt: skip

    def steps(self) -> Iterator[list[MicroBatch]]:
        """The micro-batches of the steps that are left."""
        return iter(self.loader)

    def resume(self) -> None:
        """Open the run folder, and start from its checkpoint or from the beginning."""
        self.world.on_first(lambda: refuse_foreign(self.config))
        self._open(anew=self.config.resume_from_checkpoint == "none")
        assert self._checkpoints is not None
        # The settings say what the optimizer's hyper-parameters are: a weight_decay that the user has changed counts.
        found = self._checkpoints.resume(self.engine, self._checkpoint_to_resume(), hyperparameters=False)
        if found is not None:
            self._go_on_from(found)
        self._begin()
        if found is not None:
            lower = f", the rate at {self._lr_factor:g} after rewinds" if self.loader.rewinds else ""
            self.console.say(f"resumed from {found.path}, after step {self.engine.clock.steps}{lower}")
        self.console.introduce(self.config, self.engine, self.data)

    def _go_on_from(self, found: LoadReport) -> None:
        if "loader" not in found.extra:
            raise UserError(
                f"resume_from_checkpoint: {found.path} was not saved by `elastic-lsopt train` (it has no place in "
                "the data); give one that was, or none."
            )
        self.loader.load_state_dict(found.extra["loader"])

    def step(self, microbatches: list[MicroBatch]) -> dict[str, Any]:
        """One optimizer step with its metrics, evaluation and checkpoint; returns its row of metrics.jsonl."""
        self._refuse_lost_folder()
        engine, config, start = self.engine, self.config, time.monotonic()
        before, batch = (engine.clock.steps, engine.clock.samples), self._pace.batch_at(engine.clock.samples)
        lr, report = self.advance(microbatches)
        clock = engine.clock
        step, last = clock.steps, self._ended
        row = {
            "generation": self.world.generation, "step": step, "samples": clock.samples, "loss": report.loss, "lr": lr,
            "batch": batch, "world": self.world.size, "seconds": time.monotonic() - start, **_told(report),
            **self._exchanged(),
        }  # fmt: skip
        if not report.samples:  # of several replicas: it was not taken
            return row
        if len(self.data.eval) and (last or _due(step, config.eval_steps)):
            held_out = self.evaluated()
            row["eval_loss"] = self.eval_loss = held_out.loss
            row |= {f"eval_{name}": value for name, value in held_out.metrics.items()}
        if self._probing is not None and (probes := self._probing.after(before)):
            row["probes"] = probes
        if self._folder is not None:
            self._folder.write(row)
            self._folder.state.running(step, self._last_step)
        self.console.step(row, steps=self._last_step, samples_left=self.total_samples - clock.samples)
        self.stopped = report.stop and not last
        self._streak.note(step, skipped=report.skipped)
        self._save_due = self._save_due or last or self.stopped or _due(step, config.save_steps)
        self._save_or_diverge(step, last, row.get("eval_loss"))
        return row

    def advance(self, microbatches: list[MicroBatch]) -> tuple[float, StepReport]:
        """The step alone, at the schedule's rate: that rate, and what the step reports (collective)."""
        lr, engine = self._pace.set_rate(self._lr_factor), self.engine
        engine.train_batch(microbatches)
        assert engine.last_step is not None
        self._commit(engine.last_step)
        return lr, engine.last_step

    def _commit(self, report: StepReport) -> None:
        self.loader.commit(self.engine.clock.samples - self.loader.committed)

    @property
    def _ended(self) -> bool:
        """Whether the step that has ended was the last."""
        return self.engine.clock.samples >= self.total_samples

    def _exchanged(self) -> dict[str, Any]:
        """What of the step's row tells of an exchange with other replicas."""
        return {}

    def evaluated(self, microbatch_samples: int | None = None) -> Evaluation:
        """What the model, or the average that is asked for, reaches on the held-out data (collective)."""
        with self.where_it_is_evaluated():
            return evaluate(self.engine, self.data, self.config, self.world, microbatch_samples=microbatch_samples)

    def where_it_is_evaluated(self) -> AbstractContextManager[Any]:
        """At the weights, or at the average that is asked for (collective)."""
        name = self.config.evaluate_average or self.engine.evaluates_at
        return nullcontext() if name is None else self.engine.averaged(name)

    def _save_or_diverge(self, step: int, last: bool, eval_loss: float | None) -> None:
        """Save what is due, but not while steps are skipped; see checkpoint/divergence.py (collective)."""
        assert self._checkpoints is not None
        streak = self._streak
        if streak.length >= self.config.max_skipped_steps or (last and streak.length and eval_loss is None):
            self._diverge(streak.reason, streak.first, step)
        elif last and eval_loss is not None and not math.isfinite(eval_loss):
            self._diverge(f"the held-out loss after the last step is {eval_loss}", streak.first or step + 1, step)
        elif last or not streak.length:
            if not streak.length:
                self._checkpoints.prune()  # this step has shown that the newest is good
            if self._save_due:
                self._save()

    def _diverge(self, reason: str, first: int, step: int) -> None:
        """Go back to the last good state, or end; step `first` was the first with weights that are no good."""
        config, checkpoints = self.config, self._checkpoints
        assert checkpoints is not None
        checkpoints.wait()
        self.world.on_first(lambda: set_bad_aside(checkpoints.folder, first))
        rewinds = self.loader.rewinds
        if config.on_divergence == "stop" or rewinds >= config.max_rewinds or not self._rewind(reason, step):
            diverged = Diverged(last_words(reason, checkpoints.folder, rewinds))
            self.fail(diverged)
            raise diverged

    def _rewind(self, reason: str, step: int) -> bool:
        """Go on from the newest checkpoint, which is good, at a lower rate; False where there is none (collective)."""
        assert self._checkpoints is not None
        found = self._checkpoints.resume(self.engine, "auto", hyperparameters=False)
        if found is None:
            return False
        clock = self.engine.clock
        self.loader.rewind(found.extra["loader"], step - clock.steps)
        self._streak, self.eval_loss = Streak(), None
        self._save()  # in place of what it came from: a job that is killed now comes back here, not to the old rate
        if self._folder is not None:
            self._folder.rewound()
            Journal(self._folder.path, self.console.say).write(
                Rewind(generation=self.world.generation, why=reason, from_step=step, to_step=clock.steps,
                       samples=clock.samples, lr_factor=self._lr_factor)
            )  # fmt: skip
        return True

    @property
    def _lr_factor(self) -> float:
        return self.config.rewind_lr_factor**self.loader.rewinds

    def _save(self) -> None:
        assert self._checkpoints is not None
        self._save_due = False
        extra = {"loader": self.loader.state_dict()}
        self._checkpoints.save(self.engine, self.engine.clock.steps, extra=extra, prune=False)

    def settle(self, *, save: bool) -> None:
        """Before this generation ends as planned: wait for a save under way; with `save`, make one of this step (none
        while steps are skipped)."""
        assert self._checkpoints is not None
        if save and not self._streak.length:
            self._save()
        self._checkpoints.wait()
        if save and (step := self.engine.clock.steps) < (last := self._last_step):
            self.console.say(f"paused after step {step} of {last}: it goes on when nodes come, or by the same command.")

    def finish(self) -> None:
        """After the last step: wait for the last checkpoint, export the model, say how it went."""
        self.console.close()
        assert self._checkpoints is not None
        if not self.stopped:
            self._checkpoints.prune()
        saved = self._checkpoints.wait()
        self._checkpoints.close()
        failure = None
        if self._folder is not None:
            self._folder.close()
        if self.stopped:
            step = f"{self.engine.clock.steps} of {self._last_step}"
            say_stopped(step, self._checkpoints.folder, self.console, self._streak, here=self._goes_on_from_here)
        else:
            failure = finish(self.config, self.engine, self.data, self.console, is_first=self.world.is_first)
        # Rank 0 has said all by then: who ends with an error first has the others ended by their launcher or agent.
        self.world.on_first(lambda: self._end_well(saved, failure))

    def _end_well(self, saved: SaveReport | None, export_failure: str | None) -> None:
        folder, is_result = Path(self.config.output_dir) / CHECKPOINTS, not self.stopped and not self._exports
        try:
            say_what_is_missing(saved, export_failure, folder, self.console, is_result=is_result)
        except UserError as error:
            self.fail(error)
            raise
        self._end("stopped" if self.stopped else "finished")

    @property
    def _goes_on_from_here(self) -> bool:
        """Whether a job that was told to stop has saved where it is."""
        return not self._streak.length

    def fail(self, error: BaseException) -> None:
        """The job ends by this error: say so in the run folder, which is free from now on. No communication."""
        self._end("failed", " ".join(str(error).split()) or type(error).__name__)

    def _end(self, state: State, why: str = "") -> None:
        self._say_state(state, why)
        if self._owner is not None:
            self._owner.release()

    def _say_state(self, state: State, why: str = "") -> None:
        if self._folder is not None and self._folder.begun:
            self._folder.state.say(state, self.engine.clock.steps, self._last_step, why)

    def _refuse_lost_folder(self) -> None:
        if self._owner is not None and self._owner.lost:
            raise UserError(
                f"output_dir={self.config.output_dir} was taken by another job while this one was silent; this one "
                "ends, and has changed nothing there since."
            )

    def abandon(self) -> None:
        """The generation has ended: let go of files and of a save that may be under way. No communication."""
        self.console.pause()
        if self._checkpoints is not None:
            self._checkpoints.abandon()
        if self._folder is not None:
            self._folder.close()
        if self._owner is not None:
            self._owner.leave_to_next()

    def data_identity(self) -> Identity:
        """Of both parts of the data (held-out ones of other lengths would wait for each other), and of the base."""
        return {**self.data.identity, **identity_of_base(self.config)}

    @property
    def _last_step(self) -> int:
        """Where the job ends by the batches as they are planned now."""
        clock = self.engine.clock
        return clock.steps + self._pace.steps_from(clock.samples, self.total_samples)

    def _attend(self) -> None:
        self.console.attend(speaks=self.world.speaks, steps=self._last_step, done=self.engine.clock.steps)

    def _checkpoint_to_resume(self) -> str:
        """As the settings say; but an elastic job that has lost its memory goes on from its own newest checkpoint."""
        given = self.config.resume_from_checkpoint
        own = self.config.elastic is not None and listing(Path(self.config.output_dir) / CHECKPOINTS)
        return "auto" if own else given

    @property
    def newcomer(self) -> bool:
        """See `Run`: a job of one replica has none."""
        return False

    def begin_anew(self) -> None:
        raise NotImplementedError("a job of one replica has no newcomers.")

    def members_changed(self, world: World) -> None:
        raise NotImplementedError("a job of one replica has no others.")

    def open(self) -> None:
        """Attend to the console, open the run folder, make the checkpoints' group: before the first step."""
        self._open()
        self._begin()

    def _begin(self) -> None:
        """The state is there: from here on the run folder tells of this run."""
        self._attend()
        self.world.on_first(lambda: self._folder.begin() if self._folder is not None else None)
        self._say_state("running")

    def _open(self, *, anew: bool = False) -> None:
        config = self.config
        self._attend()
        self._owner = self.world.on_first(self._own)
        self._folder = self.world.on_first(lambda: RunFolder(config, anew=anew))
        self._checkpoints = Checkpointer(
            Path(config.output_dir) / CHECKPOINTS, save_total_limit=config.save_total_limit,
            may_commit=self._may_commit, writer=self.world.generation,
        )  # fmt: skip

    def _own(self) -> Ownership:
        try:
            return Ownership.take(Path(self.config.output_dir), self.world.job, say=self.console.say)
        except OSError as error:
            raise unwritable(self.config, error) from error

    def _may_commit(self, step: int) -> bool:
        """Asked on rank 0: whether this job, and in it this generation, may still write and prune checkpoints."""
        fence = self.world.may_commit
        return (self._owner is None or self._owner.held) and (fence is None or fence(step))


def steps_of(config: TrainConfig, samples: int) -> int:
    """The steps of a job at its own batch. Raises UserError for less than one."""
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
