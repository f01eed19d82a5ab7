"""One generation of one worker, from the group that it forms to the state that it leaves behind.

    form      the process group of its members; of its replica's, in a job of several
    agree     what everybody holds, from which moment to go on, who runs what
    build     the engine and its data, for this world
    reshard   the state into it: from memory, or from a checkpoint
    mirror    the state on other nodes, before the first step
    train     until the job ends, a planned change, or a collective that breaks

Each stage gives the next what it needs. What has to be let go of is noted when it is made, and dropped whole.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from typing import Any, TypeVar
from uuid import uuid4

import torch
import torch.distributed as dist

from elastic_lsopt.api.engine import Engine
from elastic_lsopt.backends.agreement import gather_json
from elastic_lsopt.backends.fabric import Fabric, fabric_for
from elastic_lsopt.backends.fabric.signed_store import SignedStore
from elastic_lsopt.backends.groups import formed_apart
from elastic_lsopt.backends.rebuild import form_group, tear_down
from elastic_lsopt.backends.transport import Transport
from elastic_lsopt.config.elastic import ElasticConfig
from elastic_lsopt.elastic.mail.mailbox import connect, split_address
from elastic_lsopt.elastic.membership.generation import FINISHED
from elastic_lsopt.elastic.memory.mirror import Mirror
from elastic_lsopt.elastic.memory.reshard import Chosen, choose, inventory, reshard
from elastic_lsopt.elastic.memory.trail import Trail
from elastic_lsopt.elastic.memory.versions import HostVersions
from elastic_lsopt.elastic.worker.job import Run, refuse_what_counts_steps_or_ranks
from elastic_lsopt.elastic.worker.journal import Change, Journal, Phases
from elastic_lsopt.elastic.worker.link import Entered, WorkerLink
from elastic_lsopt.elastic.worker.meeting import meet
from elastic_lsopt.elastic.worker.open_files import refuse_too_few
from elastic_lsopt.elastic.worker.roll import Roll
from elastic_lsopt.elastic.worker.same_data import SameData
from elastic_lsopt.elastic.worker.ties import Ties
from elastic_lsopt.errors import PeerFailed, UserError
from elastic_lsopt.oracle.clock import SampleClock
from elastic_lsopt.oracle.step_report import Piggyback
from elastic_lsopt.plan import Plan, Policy, Worker, plan
from elastic_lsopt.schedules.adascale import Gain, measured
from elastic_lsopt.world import World, device_of

T = TypeVar("T")
Build = Callable[[World], Run]
FORM_TIMEOUT_S = 20.0
"""How long a new group may take to connect; a peer that dies meanwhile costs the rest of it."""
LAST = 2**53  # no generation comes after the end, however long an export takes
SPEEDS = 16
"""Steps whose median speed is a worker's."""
GRANT_S = 5.0
LOOK_EVERY_S = 0.05


class Interrupted(Exception):
    """A newer generation has come while this one was being formed."""


@dataclass
class Life:
    """What a worker has through all generations."""

    build: Build
    settings: ElasticConfig
    policy: Policy
    journal: Journal
    link: WorkerLink
    versions: HostVersions = field(default_factory=HostVersions)
    same_data: SameData = field(default_factory=SameData)
    job: str = ""
    """Lives on as long as one worker that has been in it."""
    seen: int = 0
    """The last step that this process has finished, committed or not."""
    unexplained: int = 0
    """Generations in a row that broke here though nobody had gone, and made no step."""
    speeds: deque[float] = field(default_factory=lambda: deque(maxlen=SPEEDS))
    """Samples per second of this worker's own forwards, in its last steps."""
    replica: int = 0
    """Of which `versions` are."""

    @property
    def timeout(self) -> timedelta:
        """Of a collective: a peer that is merely slow must not be taken for a dead one."""
        return timedelta(seconds=10 * self.settings.hang_timeout_s)


@dataclass(frozen=True)
class Formed:
    """A rank of a group; `group` talks on the host, whatever the device is."""

    world: World
    fabric: Fabric
    group: dist.ProcessGroup
    roll: Roll | None = None
    """The other replicas' words; None in a job of one."""


@dataclass(frozen=True)
class Agreed:
    """What all ranks have decided alike from what each holds."""

    inventories: list[Any]
    chosen: Chosen | None
    """The moment to go on from; None: the newest checkpoint, or the beginning."""
    plan: Plan
    before: Plan | None
    job: str
    newcomer: bool = False
    """A replica that holds nothing yet of what the others have come to."""

    def world(self, formed: Formed) -> World:
        """What a run is built for."""
        return replace(formed.world, plan=self.plan, job=self.job, newcomer=self.newcomer)


class LiveGeneration:
    """This worker in the generation that it has entered; `drop` it in every case."""

    def __init__(self, life: Life, entered: Entered) -> None:
        self.life, self.entered, self.ties = life, entered, Ties()
        self.met = False
        """Whether the group has formed: another one needs a name of its own."""
        self._undo = ExitStack()
        """Let go of everything but the host versions, without communication: peers may be dead."""
        self._undo.callback(tear_down, None)

    def live(self, phases: Phases) -> bool:
        """Form, fill, train; True when the job has ended, False after a planned change."""
        formed = self.form()
        phases.end("form")
        agreed = self.agree(formed)
        phases.end("agree")
        run = self.build(formed, agreed)
        phases.end("build")
        moved_bytes = self.reshard(formed, agreed, run)
        phases.end("reshard")
        trail = self.mirror(formed, agreed, run)
        phases.end("mirror")
        change = self._change(agreed, run, moved_bytes, trail.mirror.survives_node_loss)
        return Training(self.life, self.entered, formed, agreed, run, trail).until_it_ends(change, phases)

    def drop(self) -> None:
        self._undo.close()

    def form(self) -> Formed:
        """The process group of this generation, or of this replica in it. Raises Interrupted where a newer one comes
        first."""
        life, entered = self.life, self.entered
        rank, size = entered.together.index(life.link.name), len(entered.together)
        refuse_too_few(size, deepspeed="deepspeed" in sys.modules, cuda=torch.cuda.is_available())
        local = entered.place
        if not entered.apart:  # all of a node's workers form at once, so that their places close up
            local = [r for r, node in enumerate(entered.nodes) if node == entered.node].index(rank)
        os.environ["LOCAL_RANK"] = str(local)
        self.ties.meet_in(split_address(entered.store)[1])
        device = device_of(local)
        fabric = fabric_for(device.type)
        try:
            store, roll = self._form_group(fabric, rank, size)
        except (RuntimeError, OSError) as error:
            if entered.apart and not self.met and self._is_outdated():  # the host has died: there is another
                raise Interrupted from error
            raise
        self.ties.talk_by(Transport())
        default = dist.distributed_c10d._get_default_group()
        dist.distributed_c10d._set_pg_timeout(life.timeout, default)
        group = default if device.type == "cpu" else fabric.group(life.timeout)
        world = World(
            rank, size, device, store, entered.epoch[1], may_commit=self._may_commit if rank == 0 else None
        )  # fmt: skip
        if roll is not None:
            world = replace(
                world, replica=entered.replica, sizes=entered.sizes, meetings=roll.meetings,
                outdated=lambda: life.link.present.epoch != entered.epoch,
            )  # fmt: skip
        return Formed(world, fabric, group, roll)

    def _form_group(self, fabric: Fabric, rank: int, size: int) -> tuple[SignedStore, Roll | None]:
        entered, (replica, since) = self.entered, self.entered.epoch
        name = f"generation/{since}/replica/{replica}" if entered.apart else f"generation/{since}"
        unsigned = dist.PrefixStore(name, connect(entered.store, timedelta(seconds=FORM_TIMEOUT_S)))
        roll = Roll(entered, timedelta(seconds=2 * self.life.settings.lease_s)) if entered.apart else None
        store = meet(unsigned, rank, size, bytes.fromhex(entered.secret), look_up=self._refuse_outdated)
        self.met = True
        form_group(fabric, store, rank, size, timedelta(seconds=FORM_TIMEOUT_S))
        if entered.apart:
            formed_apart(replica, len(entered.replicas))
        return store, roll

    def agree(self, formed: Formed) -> Agreed:
        """Raises Interrupted where this world is too small for the batch: it waits for further workers."""
        life, entered = self.life, self.entered
        if life.replica != entered.replica:
            life.versions.forget()
            life.replica, life.seen = entered.replica, 0
        speed = statistics.median(life.speeds) if life.speeds else None
        own = {"samples_per_second": speed, "job": life.job, "anew": uuid4().hex}
        inventories = gather_json(formed.group, inventory(life.versions) | own)
        chosen = choose(inventories)
        gain = None if chosen is None or chosen.extra["gain"] is None else Gain(*chosen.extra["gain"])
        before = None if chosen is None else Plan.from_json(chosen.extra["plan"]).with_gain(gain)
        clock = SampleClock() if chosen is None else chosen.clock
        speeds = [found["samples_per_second"] for found in inventories]
        nodes = entered.together_on
        workers = [Worker(r, node, speed) for r, (node, speed) in enumerate(zip(nodes, speeds, strict=True))]
        life.job = next((found["job"] for found in inventories if found["job"]), "")
        newcomer = False
        if formed.roll is None:
            life.job = life.job or inventories[0]["anew"]
        else:
            newcomer, life.job = self._among_replicas(formed, formed.roll, chosen, inventories[0]["anew"])
        try:
            made = plan(workers, life.policy, clock, before=before, gain=gain)
        except UserError as error:
            if chosen is None and not newcomer:
                raise
            # A job that runs does not end for it: its state waits here for further workers.
            if formed.world.is_first:
                life.journal.say(f"generation {entered.number} waits: {error}")
            raise Interrupted from error
        return Agreed(inventories, chosen, made, before, life.job, newcomer)

    def _among_replicas(self, formed: Formed, roll: Roll, chosen: Chosen | None, anew: str) -> tuple[bool, str]:
        """Whether this replica is a newcomer, and the job's id (collective). Raises Interrupted."""
        since, job = self.entered.epoch[1], self.life.job

        def look() -> Entered:
            present = self.life.link.present
            if present.epoch != self.entered.epoch:
                raise Interrupted
            roll.follow(present)
            return present

        def said() -> tuple[bool, str]:
            waits = chosen is not None and bool(chosen.extra.get("newcomer"))
            roll.found(since, held=chosen is not None and not waits, job=job)
            newcomer = roll.is_newcomer(since, look) if chosen is None else waits
            return newcomer, roll.job(job or anew)

        return self._of_first(formed, said)

    def _of_first(self, formed: Formed, act: Callable[[], T]) -> T:
        """What rank 0 makes, as JSON, on all (collective); where it fails there, all fail."""
        made, error = None, None
        if formed.world.is_first:
            try:
                made = act()
            except (Interrupted, UserError, RuntimeError, OSError) as raised:
                error = raised
        said = str(error) if isinstance(error, UserError) else None
        [(result, users, failed), *_] = gather_json(formed.group, [made, said, error is not None])
        if error is not None:
            raise error
        if users is not None:
            raise UserError(users)
        if failed:
            raise Interrupted
        return result

    def build(self, formed: Formed, agreed: Agreed) -> Run:
        run = self.life.build(agreed.world(formed))
        self._undo.pop_all()
        self._undo.callback(tear_down, run.engine)
        self._undo.callback(run.abandon)
        refuse_what_counts_steps_or_ranks(run.engine)
        run.engine.backend.transport.at_once = True
        self.life.same_data.check(formed.group, run.data_identity, self.entered.together_on)
        if (roll := formed.roll) is not None:
            self._of_first(formed, lambda: roll.refuse_other_data(self.life.same_data.learn(run.data_identity)))
        return run

    def reshard(self, formed: Formed, agreed: Agreed, run: Run) -> int:
        """The state of the chosen moment, in this layout; the bytes that came from other ranks."""
        chosen, versions = agreed.chosen, self.life.versions
        if chosen is None:
            run.begin_anew() if agreed.newcomer else run.resume()
            return 0
        versions.go_on_from(chosen.generation, chosen.step)
        done = reshard(run.engine, versions, chosen, agreed.inventories, formed.group, self.ties.cut)
        run.loader.load_state_dict(chosen.extra["loader"])
        run.open()
        return done.received_bytes

    def mirror(self, formed: Formed, agreed: Agreed, run: Run) -> Trail:
        """This state's first version, which every mirror has before anyone steps."""
        life, entered, world = self.life, self.entered, formed.world
        group = formed.fabric.group(life.timeout)
        mirror = Mirror(group, world.rank, world.size, entered.together_on, life.settings.copies, self.ties.cut)
        self._undo.callback(self._keep_mirrored, mirror)
        trail = Trail(
            life.versions, mirror, generation=entered.epoch[1], budget_bytes=life.settings.mirror_gib * 2**30,
            timeout_s=life.timeout.total_seconds(),
        )  # fmt: skip
        self.ties.talk_by(Transport())  # now it knows the engine's groups too: DeepSpeed makes its own
        keep(run, trail, agreed.plan, wait=True)
        dist.barrier(formed.group)
        life.versions.drop_older_generations(entered.epoch[1])
        return trail

    def _keep_mirrored(self, mirror: Mirror) -> None:
        self.life.versions.adopt(mirror.close())
        self.life.versions.sum_beside()

    def _change(self, agreed: Agreed, run: Run, moved_bytes: int, survives_node_loss: bool) -> Change:
        entered, clock = self.entered, run.engine.clock
        batch = run.loader.batch_at(clock.samples)
        # A schedule of the batch is the same under any plan, which keeps it.
        scheduled = {"global_batch_size": batch} if batch != agreed.plan.global_batch_size else {}
        before, after = (told(replace(p, **scheduled)) if p is not None else None for p in (agreed.before, agreed.plan))
        assert after is not None
        return Change(
            generation=entered.number, why=entered.why, workers=entered.together, nodes=entered.together_on,
            gone=entered.gone, samples=clock.samples, step=clock.steps, source=_source(agreed, clock.steps),
            replica=entered.replica if entered.apart else None,
            redone_steps=max(0, self.life.seen - clock.steps), bytes_moved=moved_bytes, seconds={},
            before=before, after=after,
            survives_node_loss=survives_node_loss,
        )  # fmt: skip

    def _may_commit(self, step: int) -> bool:
        """Asked in the newest generation in which this group is as it is: the agent refuses older ones."""
        link, asked = self.life.link, 0
        while (number := self._followed()) > asked:
            asked = number
            timeout_s = self.life.settings.lease_s + GRANT_S
            if link.may_commit(number, step, timeout_s=timeout_s, replica=self.entered.replica):
                return True
        return False

    def _followed(self) -> int:
        newest = self.life.link.present
        return newest.number if newest.epoch == self.entered.epoch else self.entered.number

    def _refuse_outdated(self) -> None:
        if self._is_outdated():
            raise Interrupted

    def _is_outdated(self) -> bool:
        """Whether this group is another by now, or has to form in another store."""
        newest = self.life.link.present
        return newest.epoch != self.entered.epoch or newest.store_since != self.entered.store_since


def _source(agreed: Agreed, steps: int) -> str:
    if agreed.chosen is not None:
        return "memory"
    return "newcomer" if agreed.newcomer else "checkpoint" if steps else "start"


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
                self._world, generation=present.number, sizes=present.sizes, meetings=roll.meetings
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
