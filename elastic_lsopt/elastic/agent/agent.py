"""The node agent: votes for its node, starts, feeds, fences and reaps the node's workers.

    events   records of other agents · lines and exits of own workers · signals · time
      |
    membership.advance(state, event, now)            pure
      |
    effects  persist · publish · enter · kill · leave

[Note: one thread decides] Sockets and children are served by threads, which only put events into a queue; the main
thread takes them out one by one, advances the state machine and carries out its effects in order. A vote is on disk
(`Persist`) before the answer that gives it goes out (`Publish`); where it cannot be written it is not given, see
[Note: a disk that cannot be written] in membership.py.
"""

from __future__ import annotations

import gc
import logging
import queue
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from elastic_lsopt.elastic.agent.entry import told_of
from elastic_lsopt.elastic.agent.event_file import EventFile
from elastic_lsopt.elastic.agent.lease_clock import lease_now
from elastic_lsopt.elastic.agent.node import Node, begin, new_life
from elastic_lsopt.elastic.agent.status import STATUS, say_status
from elastic_lsopt.elastic.agent.vote_disk import VoteDisk
from elastic_lsopt.elastic.agent.witness import Witness
from elastic_lsopt.elastic.agent.worker_process import WorkerProcess
from elastic_lsopt.elastic.mail.inbox import Inbox, Opened
from elastic_lsopt.elastic.mail.letter import Letter
from elastic_lsopt.elastic.mail.mailbox import MANY, REST_S, Mailbox
from elastic_lsopt.elastic.membership import machine as membership
from elastic_lsopt.elastic.membership import record
from elastic_lsopt.elastic.membership.event_log import Entry
from elastic_lsopt.elastic.membership.generation import FINISHED, Generation
from elastic_lsopt.elastic.worker import manifest

log = logging.getLogger("elastic_lsopt")
TICK_S, STATUS_S = 0.05, 0.5
STATUS_SHARE = 0.005  # of an agent's time, at most: the status of many nodes is said less often
RESPAWN_WINDOW_S = 600.0  # `max_respawns` counts the workers that were started anew within it


class Agent:
    """Runs one node until the job has ended or the node has left; `main` returns the exit code.

    Raises UserError where the endpoint is neither free on this machine nor an agent's that this node can trust.
    """

    def __init__(self, node: Node) -> None:
        self.node = node
        self._events: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._workers: dict[str, WorkerProcess] = {}
        self._life, self._spawned = new_life(), 0
        self._deaths: list[float] = []
        """When workers died of themselves; those that were ended for want of a lease do not count."""
        self._fenced, self._names, self._reports = set[str](), dict[str, str](), dict[str, bytes]()
        self._generation: Generation | None = None
        self._draining = self._stopping = self._user_error = False
        self._stopped = self._trained_to_the_end = False
        """How the job has ended for this node's workers: told to stop, with its state saved, or after its last step."""
        self._forced = 0
        """The newest generation that was formed because somebody was lost."""
        self._broken: dict[tuple[int, int], tuple[float, str]] = {}
        """(generation, replica) in which a collective broke here -> when that must be explained, and the error."""
        self._exit_code: int | None = None
        witness = node.settings.witness
        self._witness = None if witness is None else Witness(witness, node.rules.job, node.secret)
        self._leave_by, self._alone_by, self._status_due = float("inf"), float("inf"), 0.0
        self._disk = VoteDisk(node.folder)
        self._log = EventFile(node.folder.events if node.settings.event_log else None)
        self.mailbox, self._state = begin(node, self._mailbox, self._log)
        node.folder.announce(self.mailbox.address)

    def _mailbox(self, address: str) -> Mailbox:
        inbox = Inbox(self.node.name, self.node.secret, self._events.put, self._hear)
        return Mailbox(
            self.node.name, address,
            inbox.take_in,
            lambda address: self._events.put(lambda: self._lost(address)),
            silence_s=self.node.settings.lease_s,
        )  # fmt: skip

    # -- the loop ----------------------------------------------------------------------------------------------

    def main(self) -> int:
        """See [Note: one thread decides]."""
        gc.freeze()  # what the imports made stays for good: a leader's garbage must not be sought in it
        before = {
            s: signal.signal(s, lambda number, _: self._events.put(lambda: self._drain(number)))
            for s in (signal.SIGTERM, signal.SIGINT)
        }
        try:
            for _ in range(self.node.workers):
                self._start_worker()
            tick = time.monotonic()
            while self._exit_code is None:
                with suppress(queue.Empty):
                    self._events.get(timeout=TICK_S)()
                    for _ in range(self._events.qsize()):
                        self._events.get_nowait()()
                many = len(self._reports) > MANY
                if many:
                    time.sleep(REST_S)
                if time.monotonic() - tick >= (self.node.rules.heartbeat_s / 2 if many else TICK_S):
                    tick = time.monotonic()
                    self._tick()
            return self._exit_code
        finally:
            for worker in self._workers.values():
                worker.kill()
            self.mailbox.close()
            for s, handler in before.items():
                signal.signal(s, handler)

    def _advance(self, event: record.Event) -> None:
        before, now = self._state, lease_now()
        may_vote = self._disk.may_vote(now)
        self._state, effects = membership.advance(before, event, now, may_vote=may_vote)
        for done, effect in enumerate(effects):
            if isinstance(effect, record.Persist) and not self._disk.write(effect.remembered, now):
                may_vote = False
                self._state, instead = membership.advance(before, event, now, may_vote=False)
                for other in instead:
                    if other not in effects[:done]:  # workers that were killed already
                        self._carry_out(other)
                break
            self._carry_out(effect)
        self._log.add(Entry(now, event, may_vote))

    def _carry_out(self, effect: record.Effect) -> None:
        match effect:
            case record.Publish(to, said):
                self._publish(to, said)
            case record.Enter(generation):
                self._enter(generation)
            case record.KillWorkers(why):
                self._fence(why)
            case record.Leave(why):
                self._leave(why)
            case record.AskWitness():
                threading.Thread(target=self._ask_witness, args=(effect,), daemon=True).start()
            case record.Note(text):
                log.info("%s: %s", self.node.name, text)

    def _publish(self, to: tuple[tuple[str, str], ...], said: record.Record) -> None:
        # Who answers is asked for its status itself.
        letter = Letter(said, None if said.answer else self._report(), self.node.secret)
        for name, address in to:
            if said.answer:
                self.mailbox.answer(name, letter)
            else:
                self.mailbox.send(address, letter)

    def _enter(self, generation: Generation) -> None:
        gone, before, ranks = generation.gone, self._generation, generation.ranks
        if before is not None and generation.number > before.number + 1:
            # Whoever vanished in the generations that this agent has missed may be dead: nobody must wait for him.
            gone += tuple(w for _, w in before.ranks if w not in gone and all(w != here for _, here in ranks))
        self._generation = generation
        groups = [f"{r.since}/replica/{k}" for k, r in enumerate(generation.replicas) if r.workers]
        self.mailbox.store.expect(generation.number, len(ranks), groups)
        if gone:
            self._forced = generation.number
        for worker in self._workers.values():
            if worker.ready:
                worker.entered |= any(w == worker.name for _, w in ranks)
                told = told_of(generation, worker.name, worker.place, self.node.secret)
                worker.tell("enter", **told, store=self._host_address(), gone=gone, node=self.node.name)

    def _fence(self, why: str) -> None:
        """End the workers that take part in a generation. One that never did is in nobody's way, and warm: it is kept
        for the next generation that lets this node in (see `_offer`)."""
        if members := [worker for worker in self._workers.values() if worker.entered]:
            log.warning("%s: %s; its workers are ended.", self.node.name, why)
        for worker in members:
            self._fenced.add(worker.name)
            worker.kill(wait=True)

    def _leave(self, why: str) -> None:
        """This node has no further part in the job: what still runs of it ends."""
        for worker in self._workers.values():
            worker.kill()
        self._disk.forget()
        well = why == FINISHED or self._draining
        if self._exit_code is None:
            self._exit_code = self._code_of_end if well else 2 if self._generation is None else 1
        if not well:
            print(f"elastic-lsopt: node {self.node.name} cannot take part in the job: {why}", file=sys.stderr)

    @property
    def _code_of_end(self) -> int:
        """Of a node that has left as it was asked to, or whose job has ended: a scheduler takes 0 for "never again"."""
        early = self._stopped or (self._draining and not self._trained_to_the_end)
        return self.node.exit_code_when_stopped if early else 0

    def _host_address(self) -> str:
        """Where the present generation's store is; "" before the first."""
        return self._generation.member[self._generation.host].address if self._generation else ""

    # -- what happens ------------------------------------------------------------------------------------------

    def _hear(self, letters: list[Opened]) -> None:
        for said, report in letters:
            if report:
                self._reports[said.name] = report
            self._names[said.address] = said.name
        self._advance(record.Heard(tuple(said for said, _ in letters)))

    def _lost(self, address: str) -> None:
        self._advance(record.Unreachable(self._names.get(address, address)))

    def _worker_said(self, worker: WorkerProcess, line: dict[str, Any]) -> None:
        match line["kind"]:
            case "ready":
                worker.ready = True
                self._offer()
            case "drain":
                self._advance(record.DrainWorker(worker.name))
            case "broken":
                # A death, which explains it, is known within a moment; only what stays unexplained asks for more.
                due = time.monotonic() + self.node.settings.lease_s
                self._broken.setdefault((line["generation"], line["replica"]), (due, line["error"]))
            case "may_commit":
                self._grant(worker, line["generation"], line["step"], line["replica"])
            case "finished":
                worker.finished = True
                stopped = line.get("stopped", False)
                self._stopped, self._trained_to_the_end = self._stopped or stopped, not stopped
            case "failed":
                if not self._user_error:  # each worker makes the same mistake
                    print(f"elastic-lsopt: {line['error']}", file=sys.stderr)
                self._user_error = True
            case "exited":
                self._reaped(worker, line["code"])

    def _reaped(self, worker: WorkerProcess, code: int) -> None:
        del self._workers[worker.name]
        if worker.finished:
            # The last barrier is behind all who were in it. Who is left has nothing to do any more, or came too late to
            # take part: such a worker may wait in a newer generation for those who have just finished.
            for other in self._workers.values():
                other.finished = True
                other.kill()
            self._advance(record.Finished())
            if self._generation is not None and not self._generation.ranks:  # all workers were told to go, and saved
                self._go()
            return
        told_to_go = worker.entered and code == 0
        self._advance(record.WorkerExited(worker.name))
        if told_to_go:  # drained
            if not self._workers:
                self._go()
        elif self._user_error:
            self._exit_code = 2  # it would fail again
        else:
            if worker.name not in self._fenced and self._exit_code is None:
                log.warning("%s: worker %s ended with code %s.", self.node.name, worker.name, code)
                self._deaths.append(time.monotonic())
            self._respawn()

    def _offer(self) -> None:
        """Tell the machine of warm workers that it does not know, or knows no more since it fenced this node."""
        for worker in list(self._workers.values()):
            known = (*self._state.workers, *self._state.waiting)
            if worker.ready and not worker.entered and worker.name not in known:
                self._advance(record.WorkerReady(worker.name))

    def _respawn(self) -> None:
        settings, since = self.node.settings, time.monotonic() - RESPAWN_WINDOW_S
        self._deaths = [died for died in self._deaths if died > since]
        if self._draining or self._exit_code is not None:
            return
        if settings.respawn and len(self._deaths) <= settings.max_respawns:
            self._start_worker()
        elif not self._workers:
            print(f"elastic-lsopt: node {self.node.name} has no worker left and starts no more.", file=sys.stderr)
            self._exit_code = 1

    def _drain(self, number: int) -> None:
        """SIGTERM, Ctrl-C or a preemption notice: the node's workers finish the step, hand over and leave."""
        if self._draining:
            return
        self._draining = True
        self._leave_by = time.monotonic() + self.node.settings.drain_timeout_s
        others = [w for _, w in self._generation.ranks if w not in self._workers] if self._generation else []
        ours = [w for _, w in self._generation.ranks if w in self._workers] if self._generation else []
        if others or not ours:
            self._advance(record.Drain())
        else:
            self._stop_job()

    def _go(self) -> None:
        """No worker is left here, nor wanted."""
        self._drain(signal.SIGTERM)
        self._advance(record.Drain())

    def _stop_job(self) -> None:
        """Nobody is left to hand over to: all workers end after this step, which is saved."""
        self._stopping = True
        for worker in self._workers.values():
            worker.tell("stop")

    def _tick(self) -> None:
        now = time.monotonic()
        for worker in self._workers.values():
            if worker.ready and (hung := worker.hung(self.node.settings.hang_timeout_s)):
                log.warning("%s: worker %s %s and is ended.", self.node.name, worker.name, hung)
                worker.kill()
        paused = self._generation is not None and not self._generation.running
        if self._draining and not self._stopping and (paused or membership.view(self._state, lease_now()).dissolving):
            self._stop_job()
        if self._draining and not self._workers and membership.view(self._state, lease_now()).dissolving:
            self._alone_by = min(self._alone_by, now + self.node.settings.lease_s)  # what others are told takes less
            if now > self._alone_by or (self._state.leads and not self._state.finished):
                self._leave("drained")
        notice = self.node.settings.preemption_notice_file
        if notice is not None and not self._draining and Path(notice).exists():
            self._drain(signal.SIGTERM)
        if now > self._leave_by and self._exit_code is None:
            log.warning("%s: workers did not leave within %g s.", self.node.name, self.node.settings.drain_timeout_s)
            self._exit_code = 1
        for number, replica in [which for which, (due, _) in self._broken.items() if now >= due]:
            _, error = self._broken.pop((number, replica))
            if self._is_unexplained(number, replica):
                log.warning("%s: generation %d broke, and no death explains it: %s", self.node.name, number, error)
            self._advance(record.Broken(number, replica))
        self._advance(record.Tick())
        self._offer()
        if now >= self._status_due:
            before_s = time.thread_time()  # time in which other processes had the core is no cost of this one
            self._say_status()
            self._status_due = now + max(STATUS_S, (time.thread_time() - before_s) / STATUS_SHARE)

    def _is_unexplained(self, number: int, replica: int) -> bool:
        """Whether no newer generation has taken the place of the group that broke."""
        present = self._state.generation
        if present is None or not present.replicas:
            return number == self._state.number
        return present.replicas[replica].since == number

    def _ask_witness(self, asked: record.AskWitness) -> None:
        """In a thread of its own: etcd may be slow or away, which counts as no answer."""
        assert self._witness is not None
        with suppress(OSError):
            said = self._witness.ask(asked.number, asked.ask)
            event = record.WitnessSaid(said.number, said.vote, asked.sent_s)
            self._events.put(lambda: self._advance(event))

    # -- workers -----------------------------------------------------------------------------------------------

    def _start_worker(self) -> None:
        self._spawned += 1
        name = f"{self.node.name}/{self._life}-{self._spawned}"
        taken = {worker.place for worker in self._workers.values()}
        place = next(place for place in range(len(taken) + 1) if place not in taken)
        self._workers[name] = WorkerProcess(
            name, place, self.node.command, self.node.environment,
            lambda worker, line: self._events.put(lambda: self._worker_said(worker, line)),
        )  # fmt: skip

    def _grant(self, worker: WorkerProcess, generation: int, step: int, replica: int) -> None:
        """Whether a checkpoint of this generation may get its name: by compare-and-set at the host, under a lease."""

        def ask() -> None:
            claimed = manifest.claim(self._host_address(), self.node.secret, generation, step, replica)
            worker.tell("granted", step=step, granted=claimed)

        # A planned change waits until its group ends; one by force means that another group may go on from here.
        if membership.view(self._state, lease_now()).lease_left_s > 0 and generation >= self._forced:
            threading.Thread(target=ask, daemon=True).start()
        else:
            worker.tell("granted", step=step, granted=False)

    # -- status ------------------------------------------------------------------------------------------------

    def _report(self) -> dict[str, Any]:
        """What this node tells of its workers, for `elastic-lsopt status`."""
        told = {w.name: {**w.told, "pid": w.process.pid, "state": w.state} for w in self._workers.values()}
        return {"workers": told, "draining": self._draining, "host": socket.gethostname()}

    def _say_status(self) -> None:
        """Into this node's own store: all that is known at the host, elsewhere where the host is."""
        seen = membership.view(self._state, lease_now())
        status = {
            "node": self.node.name, "host": seen.host, "host_address": self._host_address(),
            "generation": None if self._generation is None else self._generation.to_json(),
            "lease_left_s": seen.lease_left_s, "disk_fault": self._disk.fault, "own": self._report(),
        }  # fmt: skip
        with suppress(RuntimeError):
            self.mailbox.store.set(STATUS, say_status(status, self._reports, self.node.secret))
