"""A job with a `consensus:` block, as one of its replicas runs it: its own steps, its own folder, one order of samples.

    output_dir/                 replica 0: metrics, checkpoints, journal, and the job's model at the end
    output_dir/replica-1/ …     the others', without a model

[Note: checkpoints of replicas] Each replica saves for itself, in the step that follows an exchange: then all know the
same ledger of samples. A checkpoint is named by the job's step, the samples that have counted over global_batch_size,
so that all have the same names. A job that starts again takes the newest one that all have who were at its exchange and
are here; who has it not, because it is new or its save was cut off, is given the model by the others; what the ledger
had dealt to replicas that are no more goes to those that are. Checkpoints of one name that are of different exchanges
(of another life of the job) tell it by their ledgers.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from elastic_lsopt.api.replicas.consensus import Consensus, Exchanged
from elastic_lsopt.checkpoint.checkpointer import LoadReport
from elastic_lsopt.checkpoint.folder import CONTENTS, checkpoint_path, damage, listing, step_of
from elastic_lsopt.config.consensus import read_consensus
from elastic_lsopt.config.settings import TrainConfig
from elastic_lsopt.data.ledger import AHEAD, Ledger, below, first, length
from elastic_lsopt.data.loader import StepLoader
from elastic_lsopt.data.rounds import RoundLoader, Rounds, steps_of
from elastic_lsopt.elastic.worker.journal import Journal, Meeting
from elastic_lsopt.elastic.worker.same_data import difference
from elastic_lsopt.errors import Diverged, PeerFailed, UserError
from elastic_lsopt.oracle.family import Stateful
from elastic_lsopt.oracle.method import Method
from elastic_lsopt.oracle.microbatch import MicroBatch
from elastic_lsopt.oracle.step_report import StepReport
from elastic_lsopt.training.building.rules import of_replica, rule_of
from elastic_lsopt.training.common_checkpoint import agreed, of_the_exchange
from elastic_lsopt.training.datasets.samples import Data
from elastic_lsopt.training.loop import TrainingRun
from elastic_lsopt.training.reporting.console import Console
from elastic_lsopt.training.reporting.run_folder import CHECKPOINTS
from elastic_lsopt.training.reporting.run_state import RunState
from elastic_lsopt.training.statistics import estimate_anew, spread
from elastic_lsopt.world import World

NOBODYS = -1
LOOKED_AT = 3
"""Checkpoints whose bytes are checked when a job starts again."""
HOPELESS = "no replica that is there has finite weights"
STATISTICS_BATCHES = 50
"""Micro-batches over which batch norm's statistics are estimated."""


class ReplicaRun(TrainingRun):
    """One replica's part of the job (collective in the replica)."""

    def __init__(
        self, config: TrainConfig, method: Method, data: Data, world: World, console: Console,
        keep: Sequence[Stateful] = (),
    ) -> None:  # fmt: skip
        assert config.consensus is not None
        self._block, self._rule = read_consensus(config.consensus), rule_of(config)
        self._job = config
        self._number, self._last_microbatches, self._row = world.replica, list[MicroBatch](), dict[str, Any]()
        self._saved_at: dict[int, int] = {}
        """Of each checkpoint of this life, by its name, this replica's own step."""
        self._stop_is_saved = False
        self._counted = self._told = 0
        """Samples that had counted at the last look, and exchanges that the journal knows."""
        super().__init__(of_replica(config, world.replica), method, data, world, console, keep)
        self._exports = config.export  # the first replica does
        if world.meetings is not None and world.plan is None:
            self._refuse_other_data()

    # -- making it ---------------------------------------------------------------------------------------------

    @property
    def _consensus_of(self) -> Consensus:
        assert self.engine.consensus is not None
        return self.engine.consensus

    def _consensus(self) -> Consensus | None:
        world, block = self.world, self._block
        if world.meetings is None:
            return None  # a rehearsal
        paces = {number: float(size) for number, size in enumerate(world.sizes) if size}
        share = self.config.global_batch_size // block.replicas
        every, ahead = self._rule.every, AHEAD + self._rule.overlap
        wanted = {number: steps + ahead for number, steps in steps_of(every, paces).items()}
        ledger = (
            Ledger(self.total_samples, share)
            if world.newcomer
            else Ledger.begun(self.total_samples, share, wanted, ahead)
        )
        self.rounds = Rounds(ledger, world.replica, every, paces, ahead=ahead)
        self.rounds.version = NOBODYS if world.newcomer else 0
        return Consensus(
            self._rule, world.meetings, replicas=tuple(paces), bits=block.told.bits, top_k=block.told.top_k,
            timeout_s=block.exchange_timeout_s, rounds=self.rounds, by_speed=block.steps == "by_speed",
            newcomer=world.newcomer, outdated=world.outdated, lost=world.lost,
            disagreement_span=block.disagreement_span,
        )  # fmt: skip

    def _loader(self) -> StepLoader:
        if self.world.meetings is None:
            return super()._loader()
        plan = self.world.plan
        return RoundLoader(
            self.data.train, self.collate, self.rounds, replicas=self._block.replicas,
            microbatches=None if plan is None else plan.microbatches_of_rank[self.world.rank],
            global_batch_size=self.config.global_batch_size // self._block.replicas, **self.how_to_load(),
        )  # fmt: skip

    def _refuse_other_data(self) -> None:
        """Raise UserError where another replica trains on other data, or stands on another base model."""
        store = self.world.meetings
        assert store is not None
        mine = json.dumps(self.data_identity())
        first = store.compare_set("identity", "", mine).decode()
        _, line = difference([json.loads(first), json.loads(mine)])
        if line:
            raise UserError(f"replica {self._number}: {line}")

    # -- from the beginning, or from where it was ----------------------------------------------------------------

    def _checkpoint_to_resume(self) -> str:
        given = super()._checkpoint_to_resume()
        if given not in ("auto", "none") and self._number:  # that of replica 0; this one's lies beside it
            path = Path(given)
            own = path.parent.parent / f"replica-{self._number}" / CHECKPOINTS / path.name
            if (own / CONTENTS).exists() and of_the_exchange(own)[0] != of_the_exchange(path)[0]:
                raise UserError(
                    f"resume_from_checkpoint: {own} is of another exchange than {path}; use auto, where a replica "
                    "without one is given the model."
                )
            return str(own) if own.exists() else given
        if given != "auto":
            return given
        assert self._checkpoints is not None
        folder = Path(self.config.output_dir) / CHECKPOINTS
        newest = self.world.on_first(lambda: [path for path in listing(folder)[:LOOKED_AT] if damage(path) is None])
        named, store = None, self.world.meetings
        if newest is not None and store is not None:
            numbers = [r for r, size in enumerate(self.world.sizes) if size]
            named = agreed(store, self._number, numbers, {step_of(path): of_the_exchange(path) for path in newest})
        step = self._consensus_of.agreed(named)
        if step < 0:
            return "none"
        if step == 0:
            self._consensus_of.newcomer()
            share = self.config.global_batch_size // self._block.replicas
            nothing = Ledger(self.total_samples, share)  # it trains on nothing before it is let in
            self.rounds.resume(nothing, trained=0, version=NOBODYS)
            return "none"
        return str(checkpoint_path(folder, step))

    def _begin(self) -> None:
        super()._begin()
        if self._number and self.world.is_first:  # what happens to it from here on happens to no other
            self.console.warns_as = f"replica {self._number}: "

    def _go_on_from(self, found: LoadReport) -> None:
        self._saved_at[found.step] = self.engine.clock.steps
        saved, share = found.extra.get("loader", {}), self.config.global_batch_size // self._block.replicas
        if "ledger" not in saved:  # of a job without replicas: all begin from the same model
            super()._go_on_from(found)
            ledger = Ledger(self.total_samples, share, next=self.loader.committed, committed=self.loader.committed)
            steps = {r: self._rule.every + self.rounds.ahead for r, size in enumerate(self.world.sizes) if size}
            self.rounds.resume(ledger.dealt(steps), trained=0)
        else:
            self.loader.source.load_state_dict(saved)
            if saved["replica"] != self._number:
                raise UserError(
                    f"resume_from_checkpoint: {found.path} is of replica {saved['replica']}, and there is none of "
                    f"replica {self._number} beside it; use auto, where a replica without one is given the model."
                )
            before = Ledger.from_json(saved["ledger"])
            ledger = replace(before, batch=share).until(self.total_samples)
            trained = length(below(first(before.open.get(self._number, ()), saved["trained"]), self.total_samples))
            for gone in [r for r in ledger.open if r >= len(self.world.sizes) or not self.world.sizes[r]]:
                ledger = ledger.lost(gone)
            self.rounds.resume(ledger, trained=trained)
        self.loader.begin_at(self.rounds.cursor)

    def steps(self) -> Iterator[list[MicroBatch]]:
        """Until all samples of the job have counted, whoever has trained on them."""
        while not self.rounds.ledger.ended:
            for microbatches in self.loader:
                self._last_microbatches = microbatches
                yield microbatches
                if self._is_to_end():
                    return
            if self.stopped:
                return
            self._meet()
            if self.rounds.ledger.ended:
                self._save()
            elif self._is_to_end():
                return

    def _is_to_end(self) -> bool:
        """Whether the others have ended the job, or this replica has been told to stop while it waited for them."""
        if self._consensus_of.stops and not self._consensus_of.over:
            self.stopped = True
            self._save_the_stop()
        return self.stopped or self._consensus_of.over

    def _meet(self) -> None:
        """An exchange beside a step: before the first one, or after the last one."""
        engine = self.engine
        self._consensus_of.exchange(engine.oracle(self._last_microbatches) if self._last_microbatches else None)
        self._tell()
        if self.newcomer and self._consensus_of.hopeless:
            raise Diverged(f"the job has diverged: {HOPELESS}; start it again from an earlier checkpoint.")

    # -- in an elastic job -------------------------------------------------------------------------------------

    @property
    def newcomer(self) -> bool:
        """Whether it waits to be given the model."""
        return self.world.meetings is not None and not self._consensus_of.fit

    def begin_anew(self) -> None:
        """Others train: the first exchange gives this replica what they have come to."""
        self.open()

    def members_changed(self, world: World) -> None:
        """Other replicas have come or gone."""
        assert world.meetings is not None
        self.world = world
        living = tuple(r for r, size in enumerate(world.sizes) if size)
        self._consensus_of.members_changed(world.meetings, living, world.lost)

    # -- a step ------------------------------------------------------------------------------------------------

    def _commit(self, report: StepReport) -> None:
        if report.samples:
            self.loader.commit(report.samples)
        else:
            assert isinstance(self.loader, RoundLoader)
            self.loader.take_back()

    @property
    def _ended(self) -> bool:
        return False  # which only an exchange can say

    def _exchanged(self) -> dict[str, Any]:
        """Of the exchange before the step: members, seconds, bytes, how far apart; see probes/noise/disagreement.py."""
        told = self._tell()
        if told is None:
            return {}
        return {
            "exchange": {
                "number": told.number, "members": list(told.members), "fit": list(told.fit), "well": told.well,
                "seconds": told.seconds, "sent_bytes": told.sent_bytes,
                **(told.disagreement.to_json() if told.disagreement is not None else {}),
                **self._consensus_of.in_the_span,
            }
        }  # fmt: skip

    def _tell(self) -> Exchanged | None:
        """The newest exchange, if the journal does not know it; out of the ordinary ones it tells the user."""
        exchanges = self._consensus_of.exchanges
        if len(exchanges) == self._told:
            return None
        self._told, told = len(exchanges), exchanges[-1]
        self._speak_if_first()
        if told.extraordinary and self._folder is not None:
            meeting = Meeting(
                generation=self.world.generation, number=told.number, members=told.members, fit=told.fit,
                missing=told.missing, well=told.well, why=told.why, seconds=told.seconds,
                samples=self.engine.clock.samples, sent_bytes=told.sent_bytes,
                consensus_distance=told.consensus_distance,
            )  # fmt: skip
            Journal(self._folder.path, self.console.say).write(meeting)
        return told

    def _speak_if_first(self) -> None:
        """The first of the replicas that are there tells the user how the job goes."""
        self.console.lead(self.world.is_first and self._consensus_of.leads)

    def _save_or_diverge(self, step: int, last: bool, eval_loss: float | None) -> None:
        """Save in the step after an exchange that is due for it; a replica that is sick waits for the others' help."""
        assert self._checkpoints is not None
        streak, exchanges, most = self._streak, self._consensus_of.exchanges, self.config.max_skipped_steps
        if streak.length and self._consensus_of.hopeless:
            self._diverge(HOPELESS, streak.first, step)
        helpers = not exchanges or exchanges[-1].fit
        if streak.length >= (max(most, 3 * self._consensus_of.steps) if helpers else most):
            self._diverge(streak.reason, streak.first, step)
        if not streak.length:
            self._checkpoints.prune()
        counted, before = self.rounds.ledger.committed, self._counted
        self._counted = counted
        every = math.inf if self.config.save_steps is None else self.config.save_steps * self.config.global_batch_size
        if self.stopped:
            self._save_the_stop()
        elif exchanges and exchanges[-1].well and counted // every > before // every and not streak.length:
            self._save()

    def _save_the_stop(self) -> None:
        """Where this replica is, in the middle of a round: its steps since the newest exchange are its own, and the
        ledger that it is saved with is everybody's. Nothing before the first one, or while steps are skipped."""
        self._consensus_of.settled()
        self._tell()
        self._stop_is_saved = bool(self._name) and not self.newcomer and not self._streak.length
        if self._stop_is_saved:
            self._save()

    def _save(self) -> None:
        """Named by the job's step; nothing before the first exchange."""
        assert self._checkpoints is not None
        if name := self._name:
            self._saved_at[name] = self.engine.clock.steps
            extra = {"loader": self.loader.state_dict(), "members": self._members}
            self._checkpoints.save(self.engine, name, extra=extra, prune=False)

    @property
    def _name(self) -> int:
        return self.rounds.ledger.committed // self.config.global_batch_size

    @property
    def _members(self) -> list[int]:
        """Of the newest exchange, which have this checkpoint if all went well."""
        exchanges = self._consensus_of.exchanges
        return [*(exchanges[-1].members if exchanges else self._consensus_of.replicas)]

    def _diverge(self, reason: str, first: int, step: int) -> None:
        """As ever, but checkpoints are named by the job's steps, not by this replica's own."""
        bad = [name for name, at in self._saved_at.items() if at >= first - 1]
        super()._diverge(reason, min(bad, default=sys.maxsize - 1) + 1, step)

    # -- the end -----------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """The model becomes what the rule's paper evaluates; then as ever."""
        consensus = self._consensus_of
        if not self.stopped and not consensus.over:
            try:
                self.become_the_model()
                self._evaluate_the_model()
            except PeerFailed:
                if not consensus.over:
                    raise
            else:
                consensus.conclude()
                self._speak_if_first()
                if consensus.leads and self._number:  # the first replica was not there: this one speaks for the job
                    self.config = self._job
        if consensus.over:
            self.config = replace(self.config, export=False)
            self.console.say(f"replica {self._number} was away when the others ended the job; the model is theirs.")
        super().finish()
        if self._number and self.config is self._job and self.world.is_first:
            RunState(Path(self.config.output_dir)).say("finished", self.engine.clock.steps, self._last_step)
        if self.stopped:
            consensus.leave()  # others need not wait for it

    def fail(self, error: BaseException) -> None:
        """The job ends here by this error; others need not wait for this replica."""
        if self.engine.consensus is not None:
            self.engine.consensus.leave()
        super().fail(error)

    @property
    def _goes_on_from_here(self) -> bool:
        return self._stop_is_saved

    def become_the_model(self) -> None:
        """Take the weights that the rule's paper evaluates (collective among the replicas).

        Batch norm's statistics are estimated anew for them: those of a replica are of its own weights.
        """
        engine = self.engine
        engine.space.weights.copy_(self._consensus_of.point())
        engine.space.copies.refresh()
        train, size = self.data.train, self.config.per_device_train_batch_size
        estimate_anew(
            engine, (self.collate([train[i] for i in rows]) for rows in spread(len(train), size, STATISTICS_BATCHES))
        )

    def _evaluate_the_model(self) -> None:
        engine = self.engine
        if len(self.data.eval) and self._consensus_of.leads:
            held_out = self.evaluated()
            self.eval_loss = held_out.loss
            # What the step's row says of samples was an estimate; the last exchange has counted them.
            row = {**self._row, "samples": engine.clock.samples, "eval_loss": held_out.loss}
            row |= {f"eval_{name}": value for name, value in held_out.metrics.items()}
            if self._folder is not None and self._row:
                self._folder.write(row)

    def step(self, microbatches: list[MicroBatch]) -> dict[str, Any]:
        row = super().step(microbatches)
        self._row = row if self.engine.last_step is not None and self.engine.last_step.samples else self._row
        return row
