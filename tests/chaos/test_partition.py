"""Partitions between hosts (network namespaces): the cut node stops within its lease, the others go on after two, and
after healing it comes back; every loss is the undisturbed run's, and no step's checkpoint gets a second manifest.

One job of three nodes lives through all of it, in the order of this file. Packets are lost, nothing is refused: whoever
connects, sends or waits meets a black hole, as in a broken network.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from threading import Event, Thread

import pytest

from tests.chaos.driver import check
from tests.chaos.netns import PORT, Network, SplitCluster
from tests.processes.ranks import ROOT, rank_environment
from tests.processes.warm import Popen

pytestmark = pytest.mark.skipif(Network.missing() is not None, reason=str(Network.missing()))

NODES = ("n1", "n2", "n3")
LEASE_S = 1.5
STEPS, SAVE_STEPS = 200, 5
LATE_S = 1.0
"""How much later than the protocol says an agent on a busy machine may act."""
COMPUTE_S = 2.0
"""To form a generation and compute a step, with a core for each process that wants one."""
ELECT_S = 0.75 * LEASE_S
"""More where the host is lost: half a lease until it is suspected, and two heartbeats until one of the others has
won."""
BACK_S = 60.0
"""From the healing to the first step with the node that was cut off: its new worker may still import torch."""
START_S = 120.0
draw = random.Random(3)


def go_on_s() -> float:
    """From a cut to the next step of those who go on: two leases for the eviction, and what is computed takes as much
    longer as there are processes to a core."""
    return 2 * LEASE_S + LATE_S + COMPUTE_S * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


TALK = """
import sys, time
from elastic_lsopt.elastic.mail.mailbox import Mailbox, reachable
me, address, other = sys.argv[1:]
while me == "n2" and not reachable(other):
    time.sleep(0.1)
box = Mailbox(me, address, lambda said: box.answer("n2", said) if me == "n1" else print(time.monotonic(), flush=True),
              lambda address: print("gone", flush=True), silence_s=0.5)
while True:
    time.sleep(0.1)
    if me == "n2":
        box.send(other, b"a report")
"""
"""Two agents' mailboxes: n2 reports, n1 answers, n2 prints when it has heard."""


def test_two_mailboxes_hear_each_other_soon_after_the_network_is_whole(tmp_path: Path) -> None:
    """A connection of before would be silent for as long again as the network was broken."""
    with Network(("n1", "n2")) as network, ExitStack() as stack, (tmp_path / "heard").open("w") as heard:
        addresses = {name: f"{network.address(name)}:{PORT}" for name in ("n1", "n2")}
        for me, other in (("n1", "n2"), ("n2", "n1")):
            talker = Popen(
                [*network.inside(me), sys.executable, "-c", TALK, me, addresses[me], addresses[other]],
                cwd=ROOT, env=rank_environment(), stdout=heard,
            )  # fmt: skip
            stack.callback(talker.wait)
            stack.callback(talker.kill)
        open_files = Path(f"/proc/{talker.pid}/fd")

        def wait(since: float, limit_s: float) -> float:
            end = time.monotonic() + limit_s
            while time.monotonic() < end:
                lines = (tmp_path / "heard").read_text().splitlines()
                assert "gone" not in lines, "who is only cut off was taken for dead"
                if lines and float(lines[-1]) > since:
                    return float(lines[-1]) - since
                time.sleep(0.02)
            raise AssertionError(f"nothing heard within {limit_s} s")

        wait(0.0, START_S)
        before = len([*open_files.iterdir()])
        for _ in range(2):
            network.cut(["n1"], ["n2"])
            time.sleep(7.0)  # TCP tries after 0.2, 0.6, 1.4, 3.0, 6.2, 12.6 … s
            network.heal()
            print(f"heard again after {wait(time.monotonic(), 4.0):.2f} s")
        assert len([*open_files.iterdir()]) <= before + 2, "a new connection leaves files of the old one open"


class Job(SplitCluster):
    """The job, and every manifest that its checkpoints ever had."""

    manifests: dict[int, set[int]]

    def __init__(self, folder: Path, network: Network) -> None:
        super().__init__(
            folder, network, save_steps=SAVE_STEPS, backend="fsdp2", steps=STEPS, slow_s=0.55, lease_s=LEASE_S,
            hang_timeout_s=10.0, join_debounce_s=0.2, max_respawns=3,
        )  # fmt: skip
        self.manifests = {}
        self._ended = Event()
        Thread(target=self._watch, daemon=True).start()

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        super().__exit__(*error)

    def _watch(self) -> None:
        while not self._ended.wait(0.01):
            for file in (self.folder / "checkpoints").glob("checkpoint-*/manifest.json"):
                try:
                    self.manifests.setdefault(int(file.parent.name[11:]), set()).add(file.stat().st_mtime_ns)
                except FileNotFoundError:  # an old checkpoint that has just been deleted
                    continue

    def trains(self, *nodes: str) -> bool:
        """Whether the newest finished step was made by workers of these nodes and no other."""
        generation, _ = self.progress()
        change = next((c for c in reversed(self.changes()) if c["generation"] == generation), None)
        return change is not None and sorted(change["nodes"]) == sorted(nodes)

    def stop(self, *minority: str) -> float:
        """Wait until no worker of these nodes that has trained is alive; the seconds from now."""
        trained = [pid for pid in self.workers_of(*minority).values() if self.rows_of(pid)]
        assert trained
        return self.until(
            lambda: not {*trained} & {*self.workers().values()}, f"{minority} stops its workers", LEASE_S + LATE_S
        )

    def come_back(self, minority: str) -> float:
        """Heal the network: the minority is let in once, with a worker that never trained before; the seconds."""
        new = self.workers_of(minority)
        assert not any(self.rows_of(pid) for pid in new.values()), "a worker of the minority went on"
        known = len(self.changes())
        self.network.heal()
        seconds = self.until(lambda: self.trains(*NODES), f"{minority} is back", BACK_S)
        changes = self.changes()[known:]
        assert [c["why"] for c in changes] == [f"joined: {minority}"] and changes[0]["redone_steps"] == 0, changes
        assert changes[0]["survives_node_loss"]
        return seconds


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Job]:
    with Network(NODES) as network, Job(tmp_path_factory.mktemp("partition") / "run", network) as job:
        for _ in NODES:
            job.start()
        job.until(lambda: job.trains(*NODES), "three nodes train", START_S)
        yield job


def test_the_host_is_cut_off_in_the_middle_of_a_save(job: Job) -> None:
    """Its worker stands right before the commit, with the right to it; it must not commit beside the majority."""
    first = job.changes()[-1]
    writer, host = first["nodes"][0], job.host()
    assert writer == host == "n1" and first["survives_node_loss"]
    job.order("saving", signal.SIGSTOP)
    job.until(lambda: job.taken("saving"), "a save", 30.0)
    step = (job.progress()[1] // SAVE_STEPS) * SAVE_STEPS
    job.network.cut(["n1"], ["n2", "n3"])
    start = time.monotonic()
    stopped_s = job.stop("n1")
    job.until(lambda: job.trains("n2", "n3"), "the others go on", go_on_s() + ELECT_S - stopped_s)
    on_s = time.monotonic() - start
    assert job.host() in ("n2", "n3")
    job.until(lambda: job.progress()[1] >= step + SAVE_STEPS + 2, "further steps", 30.0)
    back_s = job.come_back("n1")
    assert not [*(job.folder / "checkpoints").glob(f".tmp-checkpoint-{step}.*")]
    print(f"host cut: its worker ended after {stopped_s:.2f} s, next step {on_s:.2f} s, back {back_s:.2f} s")


def test_another_node_is_cut_off(job: Job) -> None:
    host = job.host()
    (cut,) = draw.sample([n for n in NODES if n != host], 1)
    others = [n for n in NODES if n != cut]
    time.sleep(draw.uniform(0.0, 0.5))
    job.network.cut([cut], others)
    start = time.monotonic()
    stopped_s = job.stop(cut)
    job.until(lambda: job.trains(*others), "the others go on", go_on_s() - stopped_s)
    on_s = time.monotonic() - start
    assert job.host() == host
    back_s = job.come_back(cut)
    print(f"node cut: its worker ended after {stopped_s:.2f} s, next step {on_s:.2f} s, back {back_s:.2f} s")


@pytest.mark.parametrize("deaf", [True, False], ids=["hears-nothing", "is-not-heard"])
def test_packets_are_lost_one_way(job: Job, deaf: bool) -> None:
    """Between a node and the store's host: still one host, and the two others go on."""
    host = job.host()
    assert host is not None
    (node,) = draw.sample([n for n in NODES if n != host], 1)
    others = [n for n in NODES if n != node]
    job.network.lose([host] if deaf else [node], [node] if deaf else [host])
    start = time.monotonic()
    stopped_s = job.stop(node)
    job.until(lambda: job.trains(*others), "the others go on", go_on_s() - stopped_s)
    on_s = time.monotonic() - start
    assert job.host() == host
    back_s = job.come_back(node)
    print(f"one way: its worker ended after {stopped_s:.2f} s, next step {on_s:.2f} s, back {back_s:.2f} s")


def test_a_majority_dies_and_is_started_again(job: Job) -> None:
    """The one that is left stops; once the others' agents are back, the job goes on from its newest checkpoint."""
    host = job.host()
    assert host is not None
    lost = [host, next(n for n in NODES if n != host)]
    (left,) = [n for n in NODES if n not in lost]
    known = len(job.changes())
    for node in lost:
        job.kill(job.nodes[node].pid)
    job.stop(left)
    time.sleep(2 * LEASE_S)
    assert len(job.changes()) == known, "a minority went on"
    for node in lost:
        job.start(again=node)
    job.until(lambda: len(job.changes()) > known and job.trains(*NODES), "three nodes train again", START_S)
    assert job.changes()[known]["source"] == "checkpoint"


def test_all_this_changed_no_loss_and_gave_no_step_a_second_manifest(job: Job) -> None:
    """Two groups that trained at once would commit a step twice; a step that a change had done again may be, once."""
    job.hurry()
    job.until(lambda: not job.living(), "the end of the job", 90.0)
    assert set(job.codes.values()) == {0}, job.logs()
    check(job.rows(), STEPS, job.logs)
    done_again = [range(c["step"] + 1, c["step"] + c["redone_steps"] + 1) for c in job.changes()]
    second = {
        step: commits for step, commits in job.manifests.items()
        if len(commits) > 1 + sum(step in again for again in done_again)
    }  # fmt: skip
    assert STEPS in job.manifests and not second, (second, done_again)
