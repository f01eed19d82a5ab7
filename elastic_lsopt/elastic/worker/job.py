"""What `build(world)` makes: an engine, its data, and what belongs to a step."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from elastic_lsopt.api.engine import Engine
from elastic_lsopt.api.refusals import refuse_halves
from elastic_lsopt.checkpoint.checkpointer import Checkpointer
from elastic_lsopt.checkpoint.divergence import Streak, last_words, set_bad_aside
from elastic_lsopt.checkpoint.ownership import Ownership
from elastic_lsopt.data.loader import Dataset, StepLoader
from elastic_lsopt.data.shards import ShardStream
from elastic_lsopt.elastic.worker.rates import Rates
from elastic_lsopt.elastic.worker.same_data import Identity, identity_of
from elastic_lsopt.errors import Diverged, Unsupported, UserError
from elastic_lsopt.oracle.clock import SampleClock
from elastic_lsopt.oracle.microbatch import MicroBatch
from elastic_lsopt.world import World


class Run(Protocol):
    """One generation's training, as the elastic runtime drives it; every method is called on all ranks alike."""

    engine: Engine
    loader: StepLoader
    stopped: bool
    """Some rank asked to stop, and the state is saved: the runtime ends the job."""

    @property
    def newcomer(self) -> bool:
        """In a job of several replicas: what this one has does not count yet, because others train already and it was
        not given their model. `world.newcomer` says so at first; a state that the runtime keeps remembers it."""
        ...

    def resume(self) -> None:
        """Open, and start from the newest checkpoint or from the beginning: no living worker holds a state."""
        ...

    def open(self) -> None:
        """Make what a step needs beside the engine, files and process groups: the state comes from memory."""
        ...

    def begin_anew(self) -> None:
        """Open, as a newcomer among replicas that train already: not from a checkpoint."""
        ...

    def members_changed(self, world: World) -> None:
        """Other replicas have changed, and this one has not: between two steps, on all its ranks after the same one.
        `world` is the same but for `generation`, `sizes` and `meetings`."""
        ...

    def steps(self) -> Iterator[list[MicroBatch]]:
        """This rank's micro-batches of each step that is left."""
        ...

    def step(self, microbatches: list[MicroBatch]) -> dict[str, Any]:
        """One optimizer step and all that belongs to it; returns its object for metrics.jsonl."""
        ...

    def settle(self, *, save: bool) -> None:
        """Before this generation ends as planned: wait for a save under way; with `save`, make one of this step."""
        ...

    def finish(self) -> None:
        """After the last step, or after `stopped`; a generation may begin with it."""
        ...

    def abandon(self) -> None:
        """The generation has ended: let go of threads and files. No communication; peers may be dead."""
        ...

    def data_identity(self) -> Identity:
        """What this rank trains on, to be compared with the others'."""
        ...


@dataclass(kw_only=True)
class Job:
    """A user's own training: what `build(world)` returns to `lso.elastic.run`.

    The engine's `total_samples` is the length of the job. `dataset` and `collate` are as `StepLoader` takes them; their
    samples come in the order of `seed`. `schedule(clock)` is the share of the peak rate on committed samples (None: 1,
    the base optimizer's own rate times the plan's factor). `on_step(job, row)` is called on all ranks after each step
    and may use collectives, `on_finish(job)` after the last. `checkpoints` is a folder that all nodes share; the state
    goes there every `save_steps` steps, at the end and on a stop. After `max_skipped_steps` steps in a row that were
    skipped the job raises Diverged. Raises UserError for an engine without total_samples.
    Before the first step and when a worker joins, ranks compare their data sets: the length, and a few samples, which
    are read twice for that; a stream's shards by their names.
    """

    world: World
    engine: Engine
    dataset: Dataset | ShardStream
    collate: Callable[[list[Any]], Any]
    seed: int = 0
    schedule: Callable[[SampleClock], float] | None = None
    on_step: Callable[[Job, dict[str, Any]], None] | None = None
    on_finish: Callable[[Job], None] | None = None
    checkpoints: Path | None = None
    save_steps: int | None = None
    save_total_limit: int | None = 2
    max_skipped_steps: int = 10
    stopped: bool = field(default=False, init=False)
    newcomer: bool = field(default=False, init=False)
    loader: StepLoader = field(init=False)
    _checkpointer: Checkpointer | None = field(default=None, init=False)
    _owner: Ownership | None = field(default=None, init=False)
    _streak: Streak = field(default_factory=Streak, init=False)
    _save_due: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        plan, total_samples = self.world.plan, self.engine.clock.total_samples
        assert plan is not None
        if total_samples is None:
            raise UserError("an elastic job's engine has no total_samples, the length of the job; give it one.")
        refuse_halves(self.engine.method)
        self._rates = Rates(self.engine, plan)
        self.loader = StepLoader(
            self.dataset, self.collate, global_batch_size=plan.global_batch_size, microbatch_size=plan.microbatch_size,
            seed=self.seed, rank=self.world.rank, world=self.world.size, total_samples=total_samples,
            parts=self.engine.method.parts, microbatches=plan.microbatches_of_rank[self.world.rank],
        )  # fmt: skip

    def open(self) -> None:
        if self.checkpoints is not None:
            self._owner = self.world.on_first(self._own)
            self._checkpointer = Checkpointer(
                self.checkpoints, save_total_limit=self.save_total_limit, may_commit=self._may_commit,
                writer=self.world.generation,
            )  # fmt: skip

    def _own(self) -> Ownership:
        assert self.checkpoints is not None
        try:
            return Ownership.take(self.checkpoints, self.world.job)
        except OSError as error:
            raise UserError(f"the checkpoint folder {self.checkpoints} cannot be used: {error.strerror}.") from error

    def _may_commit(self, step: int) -> bool:
        fence = self.world.may_commit
        return (self._owner is None or self._owner.held) and (fence is None or fence(step))

    def resume(self) -> None:
        self.open()
        if self._checkpointer is not None:
            found = self._checkpointer.resume(self.engine, hyperparameters=False)
            if found is not None:
                self.loader.load_state_dict(found.extra["loader"])

    def begin_anew(self) -> None:
        self.open()

    def members_changed(self, world: World) -> None:
        self.world = world

    def steps(self) -> Iterator[list[MicroBatch]]:
        return iter(self.loader)

    def step(self, microbatches: list[MicroBatch]) -> dict[str, Any]:
        start = time.monotonic()
        lr = self._rates.set(1.0 if self.schedule is None else self.schedule(self.engine.clock))
        self.engine.train_batch(microbatches)
        report, clock = self.engine.last_step, self.engine.clock
        assert report is not None
        self.loader.commit(clock.samples - self.loader.committed)
        row = {
            "generation": self.world.generation, "step": clock.steps, "samples": clock.samples, "loss": report.loss,
            "lr": lr, "batch": self.loader.global_batch_size, "world": self.world.size,
            "seconds": time.monotonic() - start, "skipped": report.skipped,
        }  # fmt: skip
        last = clock.samples >= self.loader.total_samples
        self.stopped = report.stop and not last
        due = self.save_steps is not None and clock.steps % self.save_steps == 0
        self._streak.note(clock.steps, skipped=report.skipped)
        self._save_due = self._save_due or last or self.stopped or due
        self._save_or_end(last)
        if self.on_step is not None:
            self.on_step(self, row)
        return row

    def _save_or_end(self, last: bool) -> None:
        """Save what is due, but not while steps are skipped; see checkpoint/divergence.py."""
        streak, folder = self._streak, self.checkpoints
        if streak.length >= self.max_skipped_steps or (last and streak.length):
            if self._checkpointer is not None and folder is not None:
                self._checkpointer.wait()
                self.world.on_first(lambda: set_bad_aside(folder, streak.first))
            raise Diverged(last_words(streak.reason, folder))
        if not streak.length:
            if self._checkpointer is not None:
                self._checkpointer.prune()
            if self._save_due:
                self._save()

    def settle(self, *, save: bool) -> None:
        if save and not self._streak.length:
            self._save()
        if self._checkpointer is not None:
            self._checkpointer.wait()

    def _save(self) -> None:
        self._save_due = False
        if self._checkpointer is not None:
            extra = {"loader": self.loader.state_dict()}
            self._checkpointer.save(self.engine, self.engine.clock.steps, extra=extra, prune=False)

    def finish(self) -> None:
        if self._checkpointer is not None:
            if not self.stopped:
                self._checkpointer.prune()
            self._checkpointer.close()
        if self._owner is not None:
            self._owner.release()
        if self.on_finish is not None and not self.stopped:
            self.on_finish(self)

    def abandon(self) -> None:
        if self._checkpointer is not None:
            self._checkpointer.abandon()
        if self._owner is not None:
            self._owner.leave_to_next()

    def data_identity(self) -> Identity:
        return identity_of(self.dataset)


def refuse_what_counts_steps_or_ranks(engine: Engine) -> None:
    """Raise Unsupported where a library has read WORLD_SIZE once and for all, or moves the rate by steps (law 6)."""
    accelerate = sys.modules.get("accelerate.state")
    if accelerate is not None and accelerate.PartialState._shared_state:
        raise Unsupported(
            "an elastic job cannot hold a Hugging Face Trainer or an Accelerator: they read WORLD_SIZE once, and go on "
            "with it after a node has left; give build(world) an engine of lso, or leave out the elastic block."
        )
    if getattr(getattr(engine.backend, "engine", None), "lr_scheduler", None) is not None:
        raise Unsupported(
            "an elastic job refuses a DeepSpeed scheduler, which counts steps; give schedule, a function of the "
            "sample clock."
        )
    if hasattr(getattr(engine.base, "step", None), "_wrapped_by_lr_sched"):
        raise Unsupported(
            "an elastic job refuses a torch scheduler, which counts steps; give schedule, a function of the sample "
            "clock."
        )
