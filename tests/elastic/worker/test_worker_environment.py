"""What a worker's process finds in its environment: this node's, without a launcher's word on the agent's own place."""

from __future__ import annotations

from pathlib import Path

import pytest

from elastic_lsopt.config.elastic import ElasticConfig
from elastic_lsopt.elastic.agent import roles
from elastic_lsopt.errors import UserError

pytestmark = pytest.mark.fast


@pytest.mark.parametrize(("cores", "workers", "threads"), [(8, 2, "4"), (8, 3, "2"), (2, 4, "1"), (None, 1, "1")])
def test_workers_share_the_cores(
    monkeypatch: pytest.MonkeyPatch, cores: int | None, workers: int, threads: str
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(roles.os, "cpu_count", lambda: cores)
    assert roles._environment(workers)["OMP_NUM_THREADS"] == threads
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert roles._environment(workers)["OMP_NUM_THREADS"] == "7"


def test_a_launchers_place_is_not_the_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "MASTER_ADDR", "TORCHELASTIC_RUN_ID", "OMPI_COMM_WORLD_RANK", "PMIX_RANK", "MINE"):
        monkeypatch.setenv(name, "3")
    worker = roles._environment(2)
    assert {"RANK", "MASTER_ADDR", "TORCHELASTIC_RUN_ID", "OMPI_COMM_WORLD_RANK", "PMIX_RANK"}.isdisjoint(worker)
    assert (worker["MINE"], worker["LOCAL_WORLD_SIZE"]) == ("3", "2")


def test_each_replica_needs_a_worker(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="replicas=5 need a worker each, but max_nodes=2 nodes of workers=2 have 4"):
        roles.serve(ElasticConfig(max_nodes=2), tmp_path, workers=2, command=[], fingerprint={}, replicas=5)
