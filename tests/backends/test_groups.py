"""Replicas inside a job: each is bit for bit a job of its own on its micro-batches; what is the job's is the job's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.laws.cover import daily
from tests.processes.ranks import Ranks

KINDS = ("ddp", "fsdp2", "zero1", "zero2", "zero3")
SIZES = ([1, 1], [2, 1], [2, 2])


@pytest.mark.parametrize("kind,sizes", daily(KINDS, SIZES), ids=str)
def test_a_replica_is_a_job_of_its_own(ranks: Any, kind: str, sizes: list[int]) -> None:
    world = sum(sizes)
    for rank, r in enumerate(ranks(world).run("tests.cases.replicas:beside", kind=kind, sizes=sizes)):
        assert r["same"] and all(r["losses"]), (rank, r)
        assert r["samples"] == 4 * 4 * 2 * world and r["skipped"] == 0 and "stopped at" not in r, (rank, r)
        assert r["job"] == [rank, world] and r["replica"][1] == sizes[r["replica"][0]], (rank, r)


@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "zero2"])
def test_a_step_is_skipped_in_its_replica_alone(ranks: Any, kind: str) -> None:
    for r in ranks(3).run("tests.cases.replicas:beside", kind=kind, sizes=[2, 1], bad=True):
        assert r["skipped"] == (r["replica"][0] == 0) and r["same"] and all(r["losses"]), r


@pytest.mark.parametrize("kind,sizes", daily(["ddp", "fsdp2", "zero2", "zero3"], [[1, 1], [2, 1]]), ids=str)
def test_a_bit_of_difference_is_found_again(ranks: Any, tmp_path: Path, kind: str, sizes: list[int]) -> None:
    """Law 8, of each family that there is."""
    out = ranks(sum(sizes)).run("tests.cases.replicas:kept_apart", kind=kind, sizes=sizes, path=str(tmp_path))
    for r in out:
        assert len(r["same"]) >= 4 and all(r["same"].values()), r
    if sizes == [1, 1]:
        assert out[0]["first"] != out[1]["first"]


@pytest.mark.parametrize("sizes", [[1, 1], [1, 2]], ids=str)
def test_one_replicas_error_reaches_the_others(sizes: list[int]) -> None:
    group = Ranks(sum(sizes))  # of its own: the case cuts the connections
    try:
        first, *others = group.run("tests.cases.replicas:raised", sizes=sizes)
    finally:
        group.stop()
    assert first["met"].startswith("ValueError: on purpose")
    for r in others:
        assert r["met"].startswith("PeerFailed: rank 0 raised ValueError: on purpose") and r["took_s"] < 20, r


def test_the_first_replica_is_exported(ranks: Any, tmp_path: Path) -> None:
    out = ranks(3).run("tests.cases.replicas:exported", sizes=[1, 2], path=str(tmp_path / "model"))
    assert [r["mine"] for r in out] == [True, False, False], out
