"""Law 1 of consensus: replicas, sharded or not, drift and meet as whole models in one process do."""

from __future__ import annotations

from typing import Any

import pytest

from tests.cases.consensus import HYPERPARAMETERS

FRAMEWORK = [("ddp", [1, 1, 1]), ("fsdp2", [2, 1]), ("ddp", [1, 2]), ("fsdp2", [2, 2])]
ZERO = [("zero2", [2, 2]), ("zero3", [2, 1]), ("zero1", [1, 2]), ("zero0", [2, 1])]


@pytest.mark.parametrize("rule", HYPERPARAMETERS)
@pytest.mark.parametrize("kind,sizes", FRAMEWORK, ids=str)
def test_in_fp64(ranks: Any, kind: str, sizes: list[int], rule: str) -> None:
    out = ranks(sum(sizes)).run("tests.cases.consensus:drift", kind=kind, sizes=sizes, rule=rule)
    for rank, r in enumerate(out):
        assert r["dw"] <= 1e-12 and r["dloss"] <= 1e-12, (rank, r)
        assert [e[:3] for e in r["exchanges"]] == [[k, list(range(len(sizes))), True] for k in (0, 1)], (rank, r)
        assert r["apart"] > 1e-4, "the replicas are alike: the test sees nothing"


@pytest.mark.parametrize("rule", HYPERPARAMETERS)
@pytest.mark.parametrize("kind,sizes", ZERO, ids=str)
def test_under_zero(ranks: Any, kind: str, sizes: list[int], rule: str) -> None:
    for r in ranks(sum(sizes)).run("tests.cases.consensus:drift", kind=kind, sizes=sizes, rule=rule, dtype="fp32"):
        assert r["dw"] <= 2e-6 and r["dloss"] <= 2e-6 and r["apart"] > 1e-4, r


@pytest.mark.parametrize(("kind", "sizes"), [("fsdp2", [2, 1]), ("ddp", [1, 1, 1])], ids=str)
def test_a_replica_that_has_lost_its_numbers_is_left_out_and_given_the_model(
    ranks: Any, kind: str, sizes: list[int]
) -> None:
    everybody, well = list(range(len(sizes))), [r for r in range(len(sizes)) if r != 1]
    for rank, r in enumerate(ranks(sum(sizes)).run("tests.cases.consensus:healed", kind=kind, sizes=sizes)):
        assert r["told"] == [[everybody, everybody, True], [everybody, well, True], [everybody, everybody, True]], r
        mine = rank == (2 if sizes[0] == 2 else 1)
        assert r["finite"] == [True, True, True, not mine, *[True] * 4], (rank, r)
        assert all(m == m for m in r["momenta"]), r
