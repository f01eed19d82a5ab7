"""Jobs of two replicas of two workers each: what befalls one of them is none of the other's business.

Each replica is a user's own loop that leaves the other one's weights alone, so that every loss is the undisturbed
run's, and each step is noted with its time: a replica that the other's deaths had stopped would show a gap.
"""

from __future__ import annotations

import signal
import statistics
import time
from collections import defaultdict
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path

import pytest

from elastic_lsopt.checkpoint.folder import latest
from tests.chaos.cluster import Cluster, Row
from tests.chaos.driver import check
from tests.chaos.netns import Network, SplitCluster

SLOW_S = 0.2
"""A step waits so long, so that what else the machine does at the same time is short beside it."""
START_S, BACK_S, END_S, ORPHANS_S = 120.0, 60.0, 90.0, 20.0
PAUSE = 5.0
"""No step of an untouched replica takes more medians than that; to form anew takes ten and more."""
ELASTIC = {"lease_s": 1.5, "hang_timeout_s": 10.0, "join_debounce_s": 1.5, "max_respawns": 100}
"""Who is told to go with all others may hear it so much later than they."""
LET_GO_S = 2.75 * ELASTIC["lease_s"] + 2.0
"""As in test_partition.py: an election, an eviction, and a busy machine."""
full = pytest.mark.full


class Job:
    """A cluster of two replicas, whose fates it checks."""

    def __init__(self, cluster: Cluster, nodes: int) -> None:
        self.cluster = cluster
        for _ in range(nodes):
            cluster.start()
        self.is_whole()

    def is_whole(self) -> None:
        self.cluster.until(lambda: sorted(map(len, self.present().values())) == [2, 2], "two of two", START_S)
        self.goes_on(0, 1)

    def replica_on(self, node: str) -> int:
        """The one of that node's only worker."""
        [found] = [k for k, workers in self.present().items() if any(w.startswith(f"{node}/") for w in workers)]
        return found

    # -- what is seen ------------------------------------------------------------------------------------------

    def present(self) -> dict[int, list[str]]:
        """The workers of each replica, as the journal says."""
        newest = {c["replica"]: c for c in self.cluster.changes()}
        return {k: c["workers"] for k, c in newest.items()}

    def rows(self, replica: int, since: float = 0.0) -> list[Row]:
        """Its steps from a moment on, in the order of time."""
        mine = [row for row in self.cluster.rows() if row["replica"] == replica and row["at"] > since]
        return sorted(mine, key=lambda row: row["at"])

    def goes_on(self, *replicas: int) -> None:
        """Each of them makes three steps more."""
        now = time.time()
        for k in replicas:
            steps = lambda k=k: {row["step"] for row in self.rows(k, now)}  # noqa: E731
            self.cluster.until(lambda steps=steps: len(steps()) >= 3, f"further steps of replica {k}", BACK_S)

    def heals(self, replica: int, workers: int, known: int) -> None:
        """It has formed with so many workers, in one of the changes after the `known` ones."""

        def formed() -> bool:
            new = self.cluster.changes()[known:]
            return any((c["replica"], len(c["workers"])) == (replica, workers) for c in new)

        self.cluster.until(formed, f"{workers} workers of replica {replica}", BACK_S)
        self.goes_on(replica)

    def undisturbed(self, replica: int, since: float, changes: int, longest_s: float = 0.0) -> list[Row]:
        """Its steps since then: none left out, none done again, none late (or none later than `longest_s`)."""
        assert all(c["replica"] != replica for c in self.cluster.changes()[changes:]), self.cluster.logs()
        rows, gaps = self.rows(replica, since), []
        by_rank: dict[int, list[Row]] = defaultdict(list)
        for row in rows:
            by_rank[row["rank"]].append(row)
        for own in by_rank.values():
            assert {b["step"] - a["step"] for a, b in pairwise(own)} == {1}
            gaps += [b["at"] - a["at"] for a, b in pairwise(own)]
        median, longest = statistics.median(gaps), max(gaps)
        print(f"replica {replica}: {len(gaps)} steps, median {median:.3f} s, longest {longest:.3f} s")
        assert longest <= max(PAUSE * median, longest_s)
        return rows

    # -- what is done ------------------------------------------------------------------------------------------

    def kill(self, *workers: str) -> None:
        """No other worker gets ready in their place before `let_in`."""
        (self.cluster.folder / "hold").touch()
        pids = [pid for name, pid in self.cluster.workers().items() if name in workers]
        for how in (signal.SIGSTOP, signal.SIGKILL):  # nobody hands on what he has between two deaths
            for pid in pids:
                self.cluster.kill(pid, how)

    def let_in(self) -> None:
        (self.cluster.folder / "hold").unlink()

    def one_dies(self) -> None:
        """A worker of replica 1: it heals from memory, and again when the agent has started another."""
        since, known = time.time(), len(self.cluster.changes())
        self.kill(self.present()[1][0])
        self.heals(1, 1, known)
        self.let_in()
        self.heals(1, 2, known)
        assert {(c["replica"], c["source"]) for c in self.cluster.changes()[known:]} == {(1, "memory")}
        self.undisturbed(0, since, known)

    def all_die(self) -> None:
        """Both workers of replica 1: it is formed anew as a newcomer, and then goes on like any other."""
        since, known = time.time(), len(self.cluster.changes())
        self.kill(*self.present()[1])
        alone = lambda: any(row["sizes"] == [2, 0] for row in self.rows(0, since))  # noqa: E731
        self.cluster.until(alone, "replica 0 is alone", BACK_S)
        self.let_in()
        self.cluster.until(lambda: len(self.cluster.changes()) > known, "replica 1 is formed anew", BACK_S)
        self.heals(1, 2, known)
        new = [(c["replica"], c["source"], c["step"]) for c in self.cluster.changes()[known:]]
        assert new[0] == (1, "newcomer", 0) and {c[:2] for c in new[1:]} <= {(1, "memory")}, self.cluster.logs()
        sizes = [row["sizes"] for row in self.undisturbed(0, since, known)]
        assert sizes[0] == sizes[-1] == [2, 2]

    def host_is_lost(self) -> None:
        """Its replica heals from another node's memory; the other rides through, and both meet in the new store."""
        since, known, host = time.time(), len(self.cluster.changes()), self.cluster.host()
        assert host is not None
        hit = self.replica_on(host)
        self.cluster.kill(self.cluster.nodes[host].pid)
        self.heals(hit, 1, known)
        self.cluster.start()
        self.heals(hit, 2, known)
        assert {(c["replica"], c["source"]) for c in self.cluster.changes()[known:]} == {(hit, "memory")}
        rows = self.undisturbed(1 - hit, since, known)
        heard = [row["heard"] for row in rows]
        assert None in heard and set(heard[-4:]) <= {row["step"] for row in self.rows(hit)[-20:]}, heard

    def breaks(self) -> None:
        """A collective of replica 1, and nobody has died: it forms anew, alone."""
        since, known = time.time(), len(self.cluster.changes())
        (self.cluster.folder / "cut-1").touch()
        self.cluster.until(lambda: len(self.cluster.changes()) > known, "replica 1 forms anew", BACK_S)
        self.goes_on(1)
        [only] = self.cluster.changes()[known:]
        assert (only["replica"], only["source"], only["why"], len(only["workers"])) == (
            1, "memory", "a collective broke", 2
        )  # fmt: skip
        self.undisturbed(0, since, known)

    def leaves_as_planned(self) -> None:
        """Both nodes of replica 1: nobody will come in their place, so a worker of replica 0 moves there."""
        known = len(self.cluster.changes())
        nodes = {worker.partition("/")[0] for worker in self.present()[1]}
        for node in nodes:
            self.cluster.kill(self.cluster.nodes[node].pid, signal.SIGTERM)
        self.cluster.until(lambda: len(self.cluster.changes()) >= known + 2, "both form anew", BACK_S)
        self.goes_on(0, 1)
        new = sorted((c["replica"], c["source"], len(c["workers"])) for c in self.cluster.changes()[known:])
        assert new == [(0, "memory", 1), (1, "newcomer", 1)], self.cluster.logs()
        self.cluster.until(lambda: not nodes & {*self.cluster.living()}, "they have ended", BACK_S)
        assert {self.cluster.codes[node] for node in nodes} == {0}

    def is_told_to_go(self) -> None:
        """All nodes: each replica saves its own state, and makes no further step."""
        for process in self.cluster.nodes.values():
            self.cluster.kill(process.pid, signal.SIGTERM)
        self.cluster.until(lambda: not self.cluster.living(), "the end", BACK_S)
        self.ended_well()
        for replica in (0, 1):
            folder = self.cluster.folder / ("" if not replica else f"replica-{replica}") / "checkpoints"
            saved, step = latest(folder), self.rows(replica)[-1]["step"]
            assert saved is not None and saved.name == f"checkpoint-{step}", self.cluster.logs()
            check(self.rows(replica), step, self.cluster.logs)

    def ends(self) -> None:
        """Both replicas make all their steps, and who is through first waits for the other."""
        self.cluster.hurry()
        self.cluster.until(lambda: not self.cluster.living(), "the end of the job", END_S)
        self.ended_well()
        for replica in (0, 1):
            check(self.rows(replica), self.cluster.steps, self.cluster.logs)

    def ended_well(self) -> None:
        assert {code for code in self.cluster.codes.values() if code != -signal.SIGKILL} == {0}, self.cluster.logs()
        self.cluster.until(lambda: not self.cluster.workers(), "no orphans", ORPHANS_S)


@pytest.mark.timeout(300)
def test_a_replica_does_not_notice_what_befalls_the_other(tmp_path: Path) -> None:
    with Cluster(tmp_path / "run", backend="ddp", steps=2000, slow_s=SLOW_S, replicas=2, **ELASTIC) as cluster:
        job = Job(cluster, 4)
        job.one_dies()
        job.all_die()
        job.host_is_lost()
        job.is_told_to_go()


@full
@pytest.mark.timeout(400)
@pytest.mark.parametrize("backend", ["fsdp2", "zero2", "zero3"])
@pytest.mark.parametrize(("nodes", "workers"), [(2, 2), (4, 1)])
def test_both_end_as_they_would_have(tmp_path: Path, backend: str, nodes: int, workers: int) -> None:
    with Cluster(
        tmp_path / "run", backend=backend, steps=140, slow_s=SLOW_S, workers=workers, replicas=2, **ELASTIC
    ) as cluster:
        job = Job(cluster, nodes)
        job.one_dies()
        job.all_die()
        if nodes == 4:
            job.host_is_lost()
        job.ends()


@full
@pytest.mark.timeout(300)
def test_the_same_job_goes_on_from_both_replicas_checkpoints(tmp_path: Path) -> None:
    with Cluster(tmp_path / "run", backend="ddp", steps=60, slow_s=SLOW_S, workers=2, replicas=2, **ELASTIC) as cluster:
        job = Job(cluster, 2)
        job.is_told_to_go()
        known = len(cluster.changes())
        for _ in range(2):
            cluster.start()
        cluster.until(lambda: len(cluster.changes()) > known + 1, "both replicas again", START_S)
        again = cluster.changes()[known:][:2]
        assert sorted((c["replica"], c["source"]) for c in again) == [(0, "checkpoint"), (1, "checkpoint")]
        job.ends()


@full
@pytest.mark.timeout(300)
def test_what_is_planned_and_what_nobody_can_explain(tmp_path: Path) -> None:
    with Cluster(tmp_path / "run", backend="ddp", steps=120, slow_s=SLOW_S, replicas=2, **ELASTIC) as cluster:
        job = Job(cluster, 4)
        job.breaks()
        job.leaves_as_planned()
        job.ends()


@full
@pytest.mark.skipif(Network.missing() is not None, reason=str(Network.missing()))
@pytest.mark.timeout(400)
def test_the_host_is_cut_off(tmp_path: Path) -> None:
    """Its packets are lost, and nothing is refused. A replica that does not speak with its store takes its steps; one
    that waits for a word from there is let go when there is another host."""
    with ExitStack() as stack:
        network = stack.enter_context(Network(("n1", "n2", "n3", "n4")))
        cluster = stack.enter_context(
            SplitCluster(
                tmp_path / "run", network, save_steps=1000, backend="ddp", steps=400, slow_s=SLOW_S, replicas=2,
                **ELASTIC,
            )
        )  # fmt: skip
        job = Job(cluster, 4)
        for quiet in (True, False):
            job.is_whole()
            (cluster.folder / "quiet").touch() if quiet else (cluster.folder / "quiet").unlink()
            job.goes_on(0, 1)
            host = cluster.host()
            assert host is not None
            hit, since, known = job.replica_on(host), time.time(), len(cluster.changes())
            others = [name for name in cluster.nodes if name != host]
            network.cut([host], others)
            job.heals(hit, 1, known)
            job.goes_on(1 - hit)
            rows = job.undisturbed(1 - hit, since, known, 0.0 if quiet else LET_GO_S)
            assert quiet or rows[-1]["heard"] is not None, "they meet in another store"
            network.heal()
            job.heals(hit, 2, known)
        job.ends()
