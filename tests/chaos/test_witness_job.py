"""Four nodes split two against two: the side goes on that etcd's witness is with, or, without one, the host's side."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.chaos.driver import check
from tests.chaos.netns import Etcd, Network, SplitCluster

pytestmark = pytest.mark.skipif(Network.missing() is not None, reason=str(Network.missing()))

NODES = ("n1", "n2", "n3", "n4")
HOSTS_SIDE, OTHER_SIDE = NODES[:2], NODES[2:]
LEASE_S, LATE_S = 1.5, 1.0
STEPS = 160
GO_ON_S = 2.75 * LEASE_S + 2.0 + LATE_S
"""As in test_partition.py, with an election: a host that has lost half of its members needs one too, of the witness."""
START_S, BACK_S, END_S = 150.0, 60.0, 60.0


@pytest.mark.parametrize(
    "witness",
    [pytest.param(True, id="etcd", marks=pytest.mark.full), pytest.param(False, id="none", marks=pytest.mark.full)],
)
def test_one_side_goes_on(tmp_path: Path, witness: bool) -> None:
    """etcd lies where only the side without the host reaches it; nothing but `elastic.witness` is set for it."""
    with ExitStack() as stack:
        network = stack.enter_context(Network((*NODES, "etcd")))
        more = {"witness": stack.enter_context(Etcd(tmp_path / "etcd", network, "etcd")).address} if witness else {}
        job = stack.enter_context(
            SplitCluster(
                tmp_path / "run", network, save_steps=50, backend="ddp", steps=STEPS, slow_s=0.3, lease_s=LEASE_S,
                hang_timeout_s=10.0, join_debounce_s=0.5, max_nodes=4, **more,
            )
        )  # fmt: skip
        for _ in NODES:
            job.start()

        def train(*nodes: str) -> bool:
            generation, _ = job.progress()
            change = next((c for c in reversed(job.changes()) if c["generation"] == generation), None)
            return change is not None and sorted(change["nodes"]) == sorted(nodes)

        job.until(lambda: train(*NODES), "four nodes train", START_S)
        assert job.host() == "n1"

        on, stopped = (OTHER_SIDE, HOSTS_SIDE) if witness else (HOSTS_SIDE, OTHER_SIDE)
        old = {*job.workers_of(*stopped).values()}
        network.cut(stopped, [*on, "etcd"])
        start = time.monotonic()
        job.until(lambda: not old & {*job.workers().values()}, f"{stopped} stop", LEASE_S + LATE_S)
        stopped_s = time.monotonic() - start
        job.until(lambda: train(*on), f"{on} go on", GO_ON_S - stopped_s)
        print(f"workers ended after {stopped_s:.2f} s, next step {time.monotonic() - start:.2f} s")
        assert job.host() in on

        known = len(job.changes())
        network.heal()
        job.until(lambda: train(*NODES), "all are back", BACK_S)
        assert all(c["why"].startswith("joined: ") for c in job.changes()[known:])
        job.hurry()
        job.until(lambda: not job.living(), "the end of the job", END_S)
        check(job.rows(), STEPS, job.logs)
