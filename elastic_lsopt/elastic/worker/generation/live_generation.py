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
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from datetime import timedelta
from typing import TypeVar
from uuid import uuid4

import torch
import torch.distributed as dist

from elastic_lsopt.backends.agreement import gather_json
from elastic_lsopt.backends.fabric import Fabric, fabric_for
from elastic_lsopt.backends.fabric.signed_store import SignedStore
from elastic_lsopt.backends.groups import formed_apart
from elastic_lsopt.backends.rebuild import form_group, tear_down
from elastic_lsopt.backends.transport import Transport
from elastic_lsopt.elastic.mail.mailbox import connect, split_address
from elastic_lsopt.elastic.memory.mirror import Mirror
from elastic_lsopt.elastic.memory.reshard import Chosen, choose, inventory, reshard
from elastic_lsopt.elastic.memory.trail import Trail
from elastic_lsopt.elastic.worker.generation.life import Agreed, Formed, Interrupted, Life
from elastic_lsopt.elastic.worker.generation.training import Training, keep, told
from elastic_lsopt.elastic.worker.job import Run, refuse_what_counts_steps_or_ranks
from elastic_lsopt.elastic.worker.journal import Change, Phases
from elastic_lsopt.elastic.worker.link import Entered
from elastic_lsopt.elastic.worker.meeting import meet
from elastic_lsopt.elastic.worker.open_files import refuse_too_few
from elastic_lsopt.elastic.worker.roll import Roll
from elastic_lsopt.elastic.worker.ties import Ties
from elastic_lsopt.errors import UserError
from elastic_lsopt.oracle.clock import SampleClock
from elastic_lsopt.plan import Plan, Worker, plan
from elastic_lsopt.schedules.adascale import Gain
from elastic_lsopt.world import World, device_of

T = TypeVar("T")
FORM_TIMEOUT_S = 20.0
"""How long a new group may take to connect; a peer that dies meanwhile costs the rest of it."""
GRANT_S = 5.0


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
                lost=lambda replica: entered.unlike(life.link.present, replica),
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
