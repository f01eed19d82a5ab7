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

[Note: riding through] In a job of several replicas each is a group of its own, named by its number and the generation
that formed it (`Entered.epoch`). A generation under which that name stays changes nothing for its workers: nobody is
severed for another replica's dead, and the link tells the agent by itself that such a generation is followed, so a
worker that waits long for another replica does not count as one that hangs. Ranks are told of it at different times.
The first that knows raises the flag of a planned change, all see it after the same step, and tell each other what they
know: if the name is another one, they wait until all know that and leave together as ever; if it stays and all know of
the same generation, they note it and tell the run, all between the same two steps; if some do not know of it yet, they
go on and ask again after the next step. So nobody waits for news.
"""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
from dataclasses import replace
from datetime import timedelta

import torch
import torch.distributed as dist

from elastic_lsopt.backends.fabric import Gloo
from elastic_lsopt.backends.rebuild import form_group, tear_down
from elastic_lsopt.config.elastic import ElasticConfig
from elastic_lsopt.elastic.mail.mailbox import cut_off
from elastic_lsopt.elastic.membership.generation import FINISHED
from elastic_lsopt.elastic.worker.fault import is_peers, one_line
from elastic_lsopt.elastic.worker.generation.life import Build, Interrupted, Life
from elastic_lsopt.elastic.worker.generation.live_generation import FORM_TIMEOUT_S, LiveGeneration
from elastic_lsopt.elastic.worker.journal import Journal, Phases
from elastic_lsopt.elastic.worker.link import Entered, WorkerLink
from elastic_lsopt.elastic.worker.ties import Ties
from elastic_lsopt.oracle.clock import SampleClock
from elastic_lsopt.plan import Policy, Worker, plan
from elastic_lsopt.world import World

IDLE_S = 0.2
UNEXPLAINED = 5  # a program that fails in as many generations fails by itself, whatever its error looks like


class Runtime:
    """Drives `build` through the generations that the agent tells of; `main` returns when the job or this worker ends.

    Cost per step without a change: a host copy of this rank's state each `mirror_every` steps, its transfer beside the
    compute, nine more numbers in the step's all-reduce.
    """

    def __init__(
        self, build: Build, settings: ElasticConfig, policy: Policy, journal: Journal, link: WorkerLink
    ) -> None:
        self._life, self._link = Life(build, settings, policy, journal, link), link
        self._number = 0
        self._member = False
        """Whether a generation has had this worker."""
        self._ties = Ties()
        """Of the generation that lives now."""
        self._living: Entered | None = None
        self._tried: tuple[tuple[int, int], int] | None = None
        """The group that this worker took part in last, and the host in whose store it was to form."""
        self._spent: tuple[int, int] | None = None
        """The newest group that has formed here: it will not form again."""
        link.comes = self._comes
        signal.signal(signal.SIGTERM, lambda *_: link.request_drain())
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is the agent's to answer

    def main(self) -> None:
        """Until the job ends or this worker is no longer one of it. Raises what is this worker's own mistake."""
        self._warm_up()
        self._link.tell("ready")
        phases = Phases()
        while (entered := self._next()) is not None:
            phases.end("wait")
            generation = LiveGeneration(self._life, entered)
            ties = self._ties = generation.ties
            self._living, self._link.epoch = entered, entered.epoch
            try:
                if generation.live(phases):
                    return
            except Interrupted:
                pass
            except Exception as error:
                self._life.unexplained += not entered.gone
                if not is_peers(error, severed=ties.severed) or self._life.unexplained > UNEXPLAINED:
                    raise
                said = ties.library_error()
                ties.sever()
                whole = f"{one_line(error)} ({said})" if said else one_line(error)
                self._link.tell("broken", generation=entered.epoch[1], replica=entered.replica, error=whole)
            phases = Phases(_since=ties.broken_since or time.monotonic())
            phases.end("detect")
            self._living = self._link.epoch = None
            self._tried = entered.epoch, entered.store_since
            if generation.met:
                self._spent = entered.epoch
            generation.drop()
            self._ties = Ties()
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
            again = entered.epoch == self._spent or (entered.epoch, entered.store_since) == self._tried
            if entered.running and not again:
                return entered

    def _comes(self, entered: Entered) -> None:
        """Where somebody of this worker's group is gone, the generation that lives now ends by force. From the link's
        thread, before the main thread can know of `entered`."""
        if not entered.apart:
            if entered.gone:
                self._ties.sever()
            return
        living = self._living
        if living is not None and not {*entered.gone}.isdisjoint(living.together):
            self._ties.sever()
        if self._link.newest and self._link.present.store_since != entered.store_since:
            # Nothing comes any more from a store that was left; a network that only loses packets would not say so.
            left = self._link.present.store
            if entered.gone:
                cut_off(left)
            else:  # its host hands over, and some may still talk there
                later = threading.Timer(2 * self._life.settings.lease_s, cut_off, [left])
                later.daemon = True
                later.start()

    def _warm_up(self) -> None:
        """Form a group of one and build once, so that imports, compilers and caches are behind this worker when it
        says ready: the others wait for nothing of that. On the CPU: alone, a worker would hold the whole model, and
        its place on the node, so its GPU, is known with its first generation only."""
        os.environ["LOCAL_RANK"] = "0"
        form_group(Gloo(), dist.HashStore(), 0, 1, timedelta(seconds=FORM_TIMEOUT_S))
        policy = replace(self._life.policy, max_accumulation=None)  # which is of the real world, not of this one
        alone = plan([Worker(0, "", None)], policy, SampleClock(), before=None, gain=None)
        run = self._life.build(World(0, 1, torch.device("cpu"), dist.HashStore(), 0, alone, rehearsal=True))
        self._life.same_data.learn(run.data_identity)
        run.abandon()
        tear_down(run.engine)
        gc.freeze()  # what the imports made stays for good: a change of members must not look through it (0.2 s)
