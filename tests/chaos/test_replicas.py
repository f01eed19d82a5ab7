"""Jobs of two replicas of two workers each: what befalls one of them is none of the other's business.

Each replica is a user's own loop that talks to no other one, so that every loss is the undisturbed run's, and each step
is noted with its time: a replica that others' deaths had stopped would show a gap.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from itertools import pairwise
from pathlib import Path

import pytest

from tests.chaos.cluster import Cluster, Row
from tests.chaos.driver import check

SLOW_S = 0.15
"""A step waits so long, so that what else the machine does at the same time is short beside it."""
START_S, BACK_S, END_S = 120.0, 60.0, 90.0
PAUSE = 4.0
"""No step of an untouched replica takes more medians than that; forming anew takes ten and more."""
ELASTIC = {"lease_s": 1.5, "hang_timeout_s": 10.0, "join_debounce_s": 0.3, "max_respawns": 100}


class Job:
    """A cluster of two replicas."""

    def __init__(self, cluster: Cluster, nodes: int) -> None:
        self.cluster = cluster
        for _ in range(nodes):
            cluster.start()
        cluster.until(lambda: sorted(map(len, self.present().values())) == [2, 2], "two replicas of two", START_S)

    def present(self) -> dict[int, list[str]]:
        """The workers of each living replica, as the journal says."""
        newest = {c["replica"]: c for c in self.cluster.changes()}
        return {k: c["workers"] for k, c in newest.items()}

    def pid(self, worker: str) -> int:
        return self.cluster.workers()[worker]

    def rows(self, replica: int) -> list[Row]:
        return [row for row in self.cluster.rows() if row["replica"] == replica]

    def step(self, replica: int) -> int:
        """Its newest."""
        newest = max(self.rows(replica), key=lambda row: row["at"], default=None)
        return newest["step"] if newest else 0

    def goes_on(self, replica: int, steps: int = 3) -> None:
        before = max((row["at"] for row in self.rows(replica)), default=0.0)
        self.cluster.until(
            lambda: len({row["step"] for row in self.rows(replica) if row["at"] > before}) >= steps,
            f"further steps of replica {replica}", BACK_S,
        )  # fmt: skip

    def ends_well(self, *replicas: int) -> None:
        """All agents end with 0, and these replicas have made every step as the undisturbed run."""
        cluster = self.cluster
        cluster.hurry()
        cluster.until(lambda: not cluster.living(), "the end of the job", END_S)
        assert set(cluster.codes.values()) <= {0, -9}, cluster.logs()
        for replica in replicas:
            check(self.rows(replica), cluster.steps, cluster.logs)


def refuse_pauses(rows: list[Row], since: float, until: float) -> tuple[float, float]:
    """The median and the longest time between two steps of each rank, from one moment to another."""
    gaps = []
    by_rank: dict[int, list[Row]] = defaultdict(list)
    for row in rows:
        by_rank[row["rank"]].append(row)
    for own in by_rank.values():
        own.sort(key=lambda row: row["at"])
        assert [b["step"] - a["step"] for a, b in pairwise(own)] == [1] * (len(own) - 1), "a step done again, or none"
        gaps += [b["at"] - a["at"] for a, b in pairwise(own) if since <= b["at"] <= until]
    median, longest = statistics.median(gaps), max(gaps)
    print(f"steps: median {median:.3f} s, longest {longest:.3f} s of {len(gaps)}")
    assert longest <= PAUSE * median, f"median {median:.3f} s, longest {longest:.3f} s"
    return median, longest


@pytest.mark.timeout(300)
def test_a_replica_does_not_notice_what_befalls_the_other(tmp_path: Path) -> None:
    """One of replica 1's workers dies, and it heals; all of them die, and it is formed anew; replica 0 takes its
    steps."""
    with Cluster(
        tmp_path / "run", backend="ddp", steps=150, slow_s=SLOW_S, workers=2, replicas=2, min_nodes=2, **ELASTIC
    ) as cluster:
        job = Job(cluster, 2)
        assert {len({w.partition("/")[0] for w in workers}) for workers in job.present().values()} == {1}, "by node"
        job.goes_on(0), job.goes_on(1)
        start = time.time()

        known = len(cluster.changes())
        cluster.kill(job.pid(job.present()[1][0]))
        cluster.until(lambda: len(job.present()[1]) == 1, "replica 1 heals", BACK_S)
        cluster.until(lambda: len(job.present()[1]) == 2, "its new worker", BACK_S)
        job.goes_on(1)
        assert {(c["replica"], c["source"]) for c in cluster.changes()[known:]} == {(1, "memory")}

        known = len(cluster.changes())
        for worker in job.present()[1]:
            cluster.kill(job.pid(worker))
        cluster.until(lambda: len(cluster.changes()) > known, "replica 1 is formed anew", BACK_S)
        job.goes_on(1)
        new = cluster.changes()[known:]
        assert {c["replica"] for c in new} == {1} and new[0]["source"] == "newcomer", cluster.logs()

        refuse_pauses(job.rows(0), start, time.time())
        assert len(job.present()[0]) == 2 and [c["replica"] for c in cluster.changes()].count(0) == 1
        sizes = [row["sizes"] for row in sorted(job.rows(0), key=lambda row: row["at"])]
        assert [2, 0] in sizes and sizes[0] == sizes[-1] == [2, 2], "it is told who else lives"
        job.ends_well(0, 1)
