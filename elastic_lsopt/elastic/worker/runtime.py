"""A worker's life: one process, many generations.

    warm up, say ready
    for each committed generation:
        form the process group               survivors keep their process, their CUDA context, their data
        gather what everybody holds, choose S*, plan, build(world), reshard, mirror, barrier
        step, step, step …                   until a flag in a step's all-reduce, or a collective that breaks
        take the group down                  host versions stay

[Note: a broken generation] A dead peer is noticed by whoever talks with it: its sockets close. The others wait for
somebody who is still waiting. So every worker severs its own sockets when a collective of its breaks, and the link's
thread severs them when the agent says that somebody has gone: the main thread, wherever it waits, gets an error within
milliseconds. From there on device state means nothing; only host versions count.

[Note: a planned change] Members that join or leave are no error. The agent tells its worker of the committed
generation; the worker raises a flag that rides on the next step's all-reduce, so all see it after the same step. They
mirror that step to the end, hand over what only leavers hold, and only then take the group down.
"""

from __future__ import annotations

import gc
import os
import signal
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import timedelta
from functools import partial
from typing import Any
from uuid import uuid4

import torch
import torch.distributed as dist

from elastic_lsopt.api.engine import Engine
from elastic_lsopt.backends.agreement import gather_json
from elastic_lsopt.backends.rebuild import form_group, tear_down
from elastic_lsopt.backends.transport import Transport, shut_down
from elastic_lsopt.config.elastic import ElasticConfig
from elastic_lsopt.elastic.agent.mail.mailbox import connect, split_address
from elastic_lsopt.elastic.agent.open_files import refuse_too_few
from elastic_lsopt.elastic.membership.generation import FINISHED
from elastic_lsopt.elastic.memory.mirror import Mirror
from elastic_lsopt.elastic.memory.reshard import choose, inventory, reshard
from elastic_lsopt.elastic.memory.trail import Trail
from elastic_lsopt.elastic.memory.versions import HostVersions
from elastic_lsopt.elastic.worker.fault import is_peers, one_line
from elastic_lsopt.elastic.worker.job import Run, refuse_what_counts_steps_or_ranks
from elastic_lsopt.elastic.worker.journal import Change, Journal, Phases
from elastic_lsopt.elastic.worker.link import Entered, WorkerLink
from elastic_lsopt.elastic.worker.meeting import meet
from elastic_lsopt.elastic.worker.same_data import SameData
from elastic_lsopt.errors import PeerFailed, UserError
from elastic_lsopt.oracle.clock import SampleClock
from elastic_lsopt.oracle.report import Piggyback
from elastic_lsopt.plan import Plan, Policy, Worker, plan
from elastic_lsopt.schedules.adascale import Gain, measured
from elastic_lsopt.world import World, device_of

Build = Callable[[World], Run]
FORM_TIMEOUT_S = 20.0
"""How long a new group may take to connect; a peer that dies meanwhile costs the rest of it."""
IDLE_S = 0.2
UNEXPLAINED = 5  # a program that fails in as many generations fails by itself, whatever its error looks like
LAST = 2**53  # no generation comes after the end, however long an export takes
SPEEDS = 16
"""Steps whose median speed is a worker's."""
GRANT_S = 5.0


class Interrupted(Exception):
    """A newer generation has come while this one was being formed."""


class Runtime:
    """Drives `build` through the generations that the agent tells of; `main` returns when the job or this worker ends.

    Cost a step without a change: a host copy of this rank's state each `mirror_every` steps, its transfer beside the
    compute, nine more numbers in the step's all-reduce.
    """

    def __init__(
        self, build: Build, settings: ElasticConfig, policy: Policy, journal: Journal, link: WorkerLink
    ) -> None:
        self._build, self._settings, self._policy = build, settings, policy
        self._journal, self._link = journal, link
        self._versions, self._same_data = HostVersions(), SameData()
        self._number = 0
        self._member = False
        """Whether a generation has had this worker."""
        self._unexplained = 0
        """Generations in a row that broke here though nobody had gone, and made no step."""
        self._transport: Transport | None = None
        self._store_port = 0
        self._trail: Trail | None = None
        self._run: Run | None = None
        self._plan: Plan | None = None
        self._job = ""  # lives on as long as one worker that has been in it
        self._broken_since: float | None = None
        self._speeds: deque[float] = deque(maxlen=SPEEDS)
        """Samples a second of this worker's own forwards, in its last steps."""
        self._seen = 0
        """The last step that this process has finished, committed or not."""
        link.broken = self._sever
        signal.signal(signal.SIGTERM, lambda *_: link.request_drain())
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is the agent's to answer

    def main(self) -> None:
        """Until the job ends or this worker is no longer one of it. Raises what is this worker's own mistake."""
        self._warm_up()
        self._link.tell("ready")
        phases = Phases()
        while (entered := self._next()) is not None:
            phases.end("wait")
            try:
                if self._generation(entered, phases):
                    return
            except Interrupted:
                pass
            except Exception as error:
                self._unexplained += not entered.gone
                severed = self._transport is not None and self._transport.cut
                if not is_peers(error, severed=severed) or self._unexplained > UNEXPLAINED:
                    raise
                self._sever(None)
                self._link.tell("broken", generation=self._number, error=one_line(error))
            phases = Phases(_since=self._broken_since or time.monotonic())
            self._broken_since = None
            phases.end("detect")
            self._take_down()
            phases.end("take_down")

    def _next(self) -> Entered | None:
        """The next generation in which there is something to do; None when this worker has lost its place, or when
        the job is told to end while it waits for nodes."""
        while True:
            entered = self._link.next_generation(after=self._number, timeout_s=IDLE_S)
            if entered is None:
                if self._link.stop_requested and self._member:
                    return None
                continue
            self._number = self._link.generation = entered.number
            if entered.why == FINISHED:  # while this worker waited to take part
                self._link.tell("finished")
                return None
            if self._link.name not in entered.workers:
                if self._member:
                    return None
                continue  # not admitted yet: this generation was decided before anyone knew of this worker
            self._member = True
            if entered.running:
                return entered

    # -- one generation ----------------------------------------------------------------------------------------

    def _generation(self, entered: Entered, phases: Phases) -> bool:
        """Form, fill, train; True when the job has ended, False after a planned change."""
        world, group = self._form(entered)
        phases.end("form")
        speed = statistics.median(self._speeds) if self._speeds else None
        own = {"samples_per_second": speed, "job": self._job, "anew": uuid4().hex}
        inventories = gather_json(group, inventory(self._versions) | own)
        chosen = choose(inventories)
        gain = None if chosen is None or chosen.extra["gain"] is None else Gain(*chosen.extra["gain"])
        before = None if chosen is None else Plan.from_json(chosen.extra["plan"]).with_gain(gain)
        clock = SampleClock() if chosen is None else chosen.clock
        speeds = [found["samples_per_second"] for found in inventories]
        workers = [Worker(r, node, speed) for r, (node, speed) in enumerate(zip(entered.nodes, speeds, strict=True))]
        try:
            self._plan = plan(workers, self._policy, clock, before=before, gain=gain)
        except UserError as error:
            if chosen is None:
                raise
            # A job that runs does not end for it: its state waits here for further workers.
            if world.is_first:
                self._journal.say(f"generation {entered.number} waits: {error}")
            raise Interrupted from error
        phases.end("agree")
        self._job = next((found["job"] for found in inventories if found["job"]), inventories[0]["anew"])
        run = self._run = self._build(replace(world, plan=self._plan, job=self._job))
        refuse_what_counts_steps_or_ranks(run.engine)
        run.engine.piggyback = self._piggyback
        run.engine.backend.transport.at_once = True
        self._same_data.check(group, run.data_identity)
        phases.end("build")
        moved = 0
        if chosen is None:
            run.resume()
        else:
            self._versions.go_on_from(chosen.generation, chosen.step)
            moved = reshard(run.engine, self._versions, chosen, inventories, group, self._cut).received_bytes
            run.loader.load_state_dict(chosen.extra["loader"])
            run.open()
        phases.end("reshard")
        mirrors = dist.new_group(backend="gloo", timeout=self._timeout)
        mirror = Mirror(mirrors, world.rank, world.size, entered.nodes, self._settings.copies, self._cut)
        self._trail = Trail(
            self._versions, mirror, generation=self._number, budget_bytes=self._settings.mirror_gib * 2**30,
            timeout_s=self._timeout.total_seconds(),
        )  # fmt: skip
        self._transport = Transport()  # now it knows the engine's groups too: DeepSpeed makes its own
        self._keep(wait=True)
        dist.barrier(group)
        self._versions.drop_older_generations(entered.number)
        phases.end("mirror")
        source = "memory" if chosen is not None else "checkpoint" if run.engine.clock.steps else "start"
        change = Change(
            generation=entered.number, why=entered.why, workers=entered.workers, nodes=entered.nodes,
            gone=entered.gone, samples=run.engine.clock.samples, step=run.engine.clock.steps, source=source,
            redone_steps=max(0, self._seen - run.engine.clock.steps), bytes_moved=moved, seconds={},
            before=None if before is None else _told(before), after=_told(self._plan),
            survives_node_loss=mirror.survives_node_loss,
        )  # fmt: skip
        return self._train(run, entered, group, change, phases)

    def _train(self, run: Run, entered: Entered, group: dist.ProcessGroup, change: Change, phases: Phases) -> bool:
        stepped = False
        for microbatches in run.loader:
            row, first, stepped = run.step(microbatches), not stepped, True
            self._seen, self._unexplained = row["step"], 0
            self._note_speed(run.engine)
            if first:
                phases.end("first_step")
                self._write_journal(change, phases, group)
            self._link.progress(**{key: row[key] for key in ("step", "samples", "loss", "seconds", "batch")})
            if run.stopped:
                break
            pending = self._heard()
            # A lone worker's versions would be of use to nobody but a newcomer.
            if pending or (len(entered.workers) > 1 and row["step"] % self._settings.mirror_every == 0):
                self._keep(wait=pending)
            if pending and self._leave_together(run, entered, group):
                return False
        if not stepped and change.source == "memory":  # the end came with a change, which may have cost its save
            run.settle(save=True)
        self._link.generation = LAST
        run.finish()
        sys.stdout.flush()  # the agent of the first that is through the barrier may end the others
        dist.barrier(group)
        self._link.tell("finished", stopped=run.stopped)
        return True

    def _note_speed(self, engine: Engine) -> None:
        """The next plan may deal the micro-batches by it."""
        if engine.last_step is not None and engine.last_step.samples_per_second is not None:
            self._speeds.append(engine.last_step.samples_per_second)

    def _write_journal(self, change: Change, phases: Phases, group: dist.ProcessGroup) -> None:
        """One line, from rank 0 (collective)."""
        everyones = gather_json(group, [phases.seconds, change.bytes_moved, change.redone_steps])
        told = self._link.told_until(change.generation)
        if dist.get_rank() == 0:
            self._journal.write(change.of_all(everyones, [(e.why, e.gone) for e in told]))

    # -- host versions -----------------------------------------------------------------------------------------

    def _keep(self, *, wait: bool) -> None:
        """A host version of this step, on its way to the mirror; with `wait` every shard of it has arrived."""
        run = self._run
        assert run is not None and self._trail is not None and self._plan is not None
        step = run.engine.clock.steps + run.loader.undone_steps  # grows also where a rewind takes steps back
        gain = measured(run.engine.families)
        extra = {
            "loader": run.loader.state_dict(), "plan": self._plan.to_json(),
            "gain": None if gain is None else [gain.variance, gain.square],
        }  # fmt: skip
        self._trail.keep(run.engine, step, extra, wait=wait)

    def _piggyback(self) -> Piggyback:
        assert self._trail is not None
        return Piggyback(float(self._link.newest > self._number), self._trail.lags())

    def _heard(self) -> bool:
        """Commit what every mirror has acknowledged (C); whether a change of members is due after this step."""
        assert self._run is not None and self._trail is not None
        report = self._run.engine.last_step
        assert report is not None and report.piggyback is not None
        self._trail.heard(report.piggyback.trailing)
        if self._link.stop_requested:
            self._run.engine.request_stop()
        return report.piggyback.newer_generation > 0

    def _leave_together(self, run: Run, entered: Entered, group: dist.ProcessGroup) -> bool:
        """See [Note: a planned change]. False where it is not to be followed: this generation ends the job itself,
        because no worker stays (one more step saves) or no step and no newcomer is left to go on for."""
        assert self._trail is not None
        newer = self._link.next_generation(after=self._number, timeout_s=self._timeout.total_seconds())
        if newer is None:
            raise PeerFailed("a worker flagged a new generation of which this node's agent does not know.")
        self._link.generation = newer.number  # what follows may take long, and is no hang
        # Where changes follow each other fast, ranks know of different ones: the newest counts for all.
        _, staying, running = max(gather_json(group, [newer.number, newer.workers, newer.running]))
        leaving = [rank for rank, worker in enumerate(entered.workers) if worker not in staying]
        done = run.engine.clock.samples >= run.loader.total_samples
        if done and (not running or {*staying} <= {*entered.workers}):
            return False
        if len(leaving) == len(entered.workers):
            run.engine.request_stop()
            return False
        run.settle(save=not running)  # a job that will wait for nodes may be told to end meanwhile
        self._trail.commit_newest()  # all have waited for it before they told each other of the change
        if leaving:
            self._trail.mirror.hand_over(self._versions.newest, leaving, timeout_s=self._timeout.total_seconds())
        dist.barrier()  # whoever took the group down now would break it for those that still receive
        return True

    # -- groups ------------------------------------------------------------------------------------------------

    @property
    def _timeout(self) -> timedelta:
        """Of a collective: a peer that is merely slow must not be taken for a dead one."""
        return timedelta(seconds=10 * self._settings.hang_timeout_s)

    def _form(self, entered: Entered) -> tuple[World, dist.ProcessGroup]:
        """The process group of this generation. Raises Interrupted where a newer one comes first."""
        rank, size = entered.workers.index(self._link.name), len(entered.workers)
        refuse_too_few(size, deepspeed="deepspeed" in sys.modules, cuda=torch.cuda.is_available())
        local = [r for r, node in enumerate(entered.nodes) if node == entered.node].index(rank)
        os.environ["LOCAL_RANK"] = str(local)
        self._broken_since = None
        self._store_port = split_address(entered.store)[1]
        unsigned = dist.PrefixStore(
            f"generation/{entered.number}", connect(entered.store, timedelta(seconds=FORM_TIMEOUT_S))
        )
        store = meet(unsigned, rank, size, bytes.fromhex(entered.secret), look_up=self._refuse_outdated)
        device = device_of(local)
        form_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", store, rank, size,
            timedelta(seconds=FORM_TIMEOUT_S),
        )  # fmt: skip
        self._transport = Transport()
        default = dist.distributed_c10d._get_default_group()
        dist.distributed_c10d._set_pg_timeout(self._timeout, default)
        group = default if device.type == "cpu" else dist.new_group(backend="gloo", timeout=self._timeout)
        fence = partial(self._may_commit, entered.number) if rank == 0 else None
        return World(rank, size, device, store, entered.number, may_commit=fence), group

    def _may_commit(self, generation: int, step: int) -> bool:
        return self._link.may_commit(generation, step, timeout_s=self._settings.lease_s + GRANT_S)

    def _refuse_outdated(self) -> None:
        if self._link.newest > self._number:
            raise Interrupted

    def _take_down(self) -> None:
        """Let go of everything but the host versions. No communication."""
        run, trail, self._run, self._trail = self._run, self._trail, None, None
        if run is not None:
            run.abandon()
        if trail is not None:
            self._versions.adopt(trail.mirror.close())
            self._versions.sum_beside()
        self._transport, self._store_port = None, 0
        tear_down(run.engine if run is not None else None)

    def _sever(self, entered: Entered | None) -> None:
        """See [Note: a broken generation]. From any thread."""
        if self._broken_since is None:
            self._broken_since = time.monotonic()
        if (transport := self._transport) is not None:
            transport.sever()
        if self._store_port:  # a group that is being formed waits in the store for one who will not come
            shut_down({self._store_port})

    def _cut(self) -> bool:
        """Whether this generation is over by force."""
        return self._broken_since is not None

    def _warm_up(self) -> None:
        """Form a group of one and build once, so that imports, compilers and caches are behind this worker when it
        says ready: the others wait for nothing of that. On the CPU: alone, a worker would hold the whole model, and
        its place on the node, so its GPU, is known with its first generation only."""
        os.environ["LOCAL_RANK"] = "0"
        form_group("gloo", dist.HashStore(), 0, 1, timedelta(seconds=FORM_TIMEOUT_S))
        policy = replace(self._policy, max_accumulation=None)  # which is of the real world, not of this one
        alone = plan([Worker(0, "", None)], policy, SampleClock(), before=None, gain=None)
        run = self._build(World(0, 1, torch.device("cpu"), dist.HashStore(), 0, alone, rehearsal=True))
        self._same_data.learn(run.data_identity)
        run.abandon()
        tear_down(run.engine)
        gc.freeze()  # what the imports made stays for good: a change of members must not look through it (0.2 s)


def _told(plan: Plan) -> dict[str, Any]:
    """The hyper-parameters that a plan is heading for, without what the job does not have; each rank's micro-batches a
    step."""
    target = plan.target.of(plan.reference, plan.global_batch_size)
    told = {key: value for key, value in asdict(target).items() if value is not None}
    return told | {"held_by": plan.why, "units": [len(mine) for mine in plan.microbatches_of_rank]}
