"""The steps of a generation, until the job ends or a planned change; and what other replicas do meanwhile."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from typing import Any

import torch.distributed as dist

from elastic_lsopt.api.engine import Engine
from elastic_lsopt.backends.agreement import gather_json
from elastic_lsopt.elastic.membership.generation import FINISHED
from elastic_lsopt.elastic.memory.trail import Trail
from elastic_lsopt.elastic.worker.generation.life import Agreed, Formed, Life
from elastic_lsopt.elastic.worker.job import Run
from elastic_lsopt.elastic.worker.journal import Change, Phases
from elastic_lsopt.elastic.worker.link import Entered
from elastic_lsopt.elastic.worker.roll import Roll
from elastic_lsopt.errors import PeerFailed
from elastic_lsopt.oracle.step_report import Piggyback
from elastic_lsopt.plan import Plan
from elastic_lsopt.schedules.adascale import measured

LAST = 2**53  # no generation comes after the end, however long an export takes
LOOK_EVERY_S = 0.05


class Training:
    """The steps of a generation that is filled and mirrored. See runtime.py, [Note: riding through]."""

    def __init__(self, life: Life, entered: Entered, formed: Formed, agreed: Agreed, run: Run, trail: Trail) -> None:
        self._life, self._entered, self._group, self._plan = life, entered, formed.group, agreed.plan
        self._run, self._trail = run, trail
        self._roll, self._world = formed.roll, agreed.world(formed)
        self._noted = entered.number
        """The newest generation that this group has been through together."""
        run.engine.piggyback = self._piggyback

    def until_it_ends(self, change: Change, phases: Phases) -> bool:
        """True when the job has ended, False after a planned change."""
        life, run, entered, stepped = self._life, self._run, self._entered, False
        began = False
        for microbatches in run.steps():
            row, first, stepped = run.step(microbatches), not stepped, True
            life.seen, life.unexplained = row["step"], 0
            self._note_speed(run.engine)
            if first:
                phases.end("first_step")
                self._write_journal(change, phases)
            if self._roll is not None and not began and not is_newcomer(run):
                began = True
                self._say(lambda roll: roll.began(entered.epoch[1]))
            life.link.progress(**{key: row[key] for key in ("step", "samples", "loss", "seconds", "batch")})
            if run.stopped:
                break
            pending = self._heard()
            # A lone worker's versions would be of use to nobody but a newcomer.
            if pending or (len(entered.together) > 1 and row["step"] % life.settings.mirror_every == 0):
                keep(run, self._trail, self._plan, wait=pending)
            if pending and self._leave_together():
                return False
        if not stepped and change.source == "memory":  # the end came with a change, which may have cost its save
            run.settle(save=True)
        life.link.generation = LAST
        run.finish()
        sys.stdout.flush()  # the agent of the first that is through the barrier may end the others
        dist.barrier(self._group)
        if self._roll is not None:
            self._wait_for_the_others(self._roll)
        life.link.tell("finished", stopped=run.stopped)
        return True

    def _note_speed(self, engine: Engine) -> None:
        """The next plan may deal the micro-batches by it."""
        if engine.last_step is not None and engine.last_step.samples_per_second is not None:
            self._life.speeds.append(engine.last_step.samples_per_second)

    def _write_journal(self, change: Change, phases: Phases) -> None:
        """One line, from rank 0 (collective)."""
        everyones = gather_json(self._group, [phases.seconds, change.bytes_moved, change.redone_steps])
        heard = self._life.link.told_until(change.generation)
        if dist.get_rank() == 0:
            self._life.journal.write(change.of_all(everyones, [(e.why, e.gone) for e in heard]))

    def _piggyback(self) -> Piggyback:
        return Piggyback(float(self._life.link.newest > self._noted), self._trail.lags())

    def _heard(self) -> bool:
        """Commit what every mirror has acknowledged (C); whether a change of members is due after this step."""
        report = self._run.engine.last_step
        assert report is not None and report.piggyback is not None
        self._trail.heard(report.piggyback.trailing)
        if self._life.link.stop_requested:
            self._run.engine.request_stop()
        return report.piggyback.newer_generation > 0 and not (self._entered.apart and self._rides())

    # -- other replicas ----------------------------------------------------------------------------------------

    def _rides(self) -> bool:
        """Whether the newer generation leaves this replica as it is; then it is noted, once all ranks know of the same
        one (collective)."""
        present = self._life.link.present
        heard = gather_json(self._group, [present.number, present.epoch == self._entered.epoch])
        if not all(same for _, same in heard):
            return False
        if len({number for number, _ in heard}) == 1:
            self._ride(present)
        return True

    def _ride(self, present: Entered) -> None:
        roll = self._roll
        assert roll is not None
        reached = True
        try:
            roll.follow(present)
        except (RuntimeError, OSError):  # this host has died too
            reached = False
        if all(gather_json(self._group, reached)):  # else again after the next step
            self._noted = present.number
            self._life.link.told_until(present.number)  # news of others, which no line of this replica's journal is for
            self._world = replace(
                self._world, generation=present.number, sizes=present.sizes, meetings=roll.meetings,
                lost=lambda replica: present.unlike(self._life.link.present, replica),
            )  # fmt: skip
            self._run.members_changed(self._world)

    def _say(self, word: Callable[[Roll], None]) -> None:
        """From rank 0. A store that does not answer is followed by another, which is told again."""
        if self._roll is not None and self._world.is_first:
            with suppress(RuntimeError, OSError):
                word(self._roll)

    def _wait_for_the_others(self, roll: Roll) -> None:
        """The first that tells its agent of the end ends the job. See roll.py for who is waited for."""
        self._say(Roll.finish)
        link = self._life.link
        while link.present.why != FINISHED:
            with suppress(RuntimeError, OSError):
                roll.follow(link.present)
                if not roll.unfinished(link.present):
                    return
            time.sleep(LOOK_EVERY_S)

    # -- a planned change --------------------------------------------------------------------------------------

    def _leave_together(self) -> bool:
        """See runtime.py, [Note: a planned change]. False where it is not to be followed: this generation ends the job
        itself, because no worker stays (one more step saves) or no step and no newcomer is left to go on for.

        Nobody stays either where those that the change lets stay were told to go too, a moment later: each of the next
        generations would hand over to the one after, and the last has nobody who could save.
        """
        life, run, entered = self._life, self._run, self._entered
        timeout_s = life.timeout.total_seconds()
        newer = life.link.other_epoch(entered.epoch, timeout_s)
        if newer is None:
            raise PeerFailed("a worker flagged a new generation of which this node's agent does not know.")
        life.link.generation = newer.number  # what follows may take long, and is no hang
        # Where changes follow each other fast, ranks know of different ones: the newest counts for all.
        own = [newer.number, newer.of_replica(entered.replica), newer.running]
        heard = gather_json(self._group, [own, life.link.leaves])
        _, staying, running = max(change for change, _ in heard)
        leaving = [rank for rank, worker in enumerate(entered.together) if worker not in staying]
        told_to_go = {rank for rank, (_, leaves) in enumerate(heard) if leaves}
        done = run.engine.clock.samples >= run.loader.total_samples
        if done and (not running or {*staying} <= {*entered.together}):
            return False
        if len(told_to_go.union(leaving)) == len(entered.together) and not entered.apart:
            run.engine.request_stop()
            return False
        run.settle(save=not running)  # a job that will wait for nodes may be told to end meanwhile
        self._trail.commit_newest()  # all have waited for it before they told each other of the change
        if 0 < len(leaving) < len(entered.together):  # a replica that goes whole leaves its part to the others
            self._trail.mirror.hand_over(life.versions.newest, leaving, timeout_s=timeout_s)
        dist.barrier()  # whoever took the group down now would break it for those that still receive
        return True


def is_newcomer(run: Run) -> bool:
    """Whether what it has does not count; of a run that knows nothing of replicas it does."""
    return bool(getattr(run, "newcomer", False))


def keep(run: Run, trail: Trail, plan: Plan, *, wait: bool) -> None:
    """A host version of this step, on its way to the mirror; with `wait` every shard of it has arrived."""
    step = run.engine.clock.steps + run.loader.undone_steps  # grows also where a rewind takes steps back
    gain = measured(run.engine.families)
    extra = {
        "loader": run.loader.state_dict(), "plan": plan.to_json(),
        "gain": None if gain is None else [gain.variance, gain.square],
    }  # fmt: skip
    if is_newcomer(run):
        extra["newcomer"] = True
    trail.keep(run.engine, step, extra, wait=wait)


def told(plan: Plan) -> dict[str, Any]:
    """The hyper-parameters that a plan is heading for, without what the job does not have; each rank's micro-batches
    per step."""
    target = plan.target.of(plan.reference, plan.global_batch_size)
    found = {key: value for key, value in asdict(target).items() if value is not None}
    return found | {"held_by": plan.why, "units": [len(mine) for mine in plan.microbatches_of_rank]}
