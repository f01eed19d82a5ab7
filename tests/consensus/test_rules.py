"""Law 1 of consensus: replicas, sharded or not, drift and meet as whole models in one process do."""

from __future__ import annotations

import math
from typing import Any

import pytest

from tests.cases.consensus import HYPERPARAMETERS
from tests.laws.cover import daily_of, full_but

KINDS = [
    ("ddp", [1, 1, 1]), ("ddp", [1, 2]), ("ddp", [2, 2]), ("fsdp2", [2, 1]), ("fsdp2", [2, 2]), ("zero0", [2, 1]),
    ("zero1", [1, 2]), ("zero2", [2, 2]), ("zero3", [2, 1]), ("zero3", [2, 2]),
]  # fmt: skip
ROWS = [(kind, rule) for kind in KINDS for rule in HYPERPARAMETERS]
BF16 = {"muloco": (1e-2, 1e-4)}
"""Limits of weights and losses where the numbers of an update are bf16 (Muon's) and another order of a sum shows."""


@pytest.mark.parametrize("kind,sizes,rule", daily_of(ROWS, seed=17), ids=str)
def test_drift_is_the_loops(ranks: Any, kind: str, sizes: list[int], rule: str) -> None:
    zero = kind.startswith("zero")
    dtype, limits = ("fp32", BF16.get(rule, (2e-6, 2e-6))) if zero else ("fp64", (1e-12, 1e-12))
    out = ranks(sum(sizes)).run("tests.cases.consensus:drift", kind=kind, sizes=sizes, rule=rule, dtype=dtype)
    assert all(r["begins"] == out[0]["begins"] for r in out), "the ranks were not given the same"
    worst = {rank: (r["dw"], r["dlosses"]) for rank, r in enumerate(out)}
    for rank, r in enumerate(out):
        assert [e[:3] for e in r["exchanges"]] == [[k, list(range(len(sizes))), True] for k in (0, 1)], (rank, r)
        assert r["dw"] <= limits[0] and max(r["dlosses"]) <= limits[1], f"rank {rank} of {worst}"
        assert r["passes"] == [2], "a gradient of an exchange is none of the step's"
        assert r["apart"] > 1e-4, "the replicas are alike: the test sees nothing"


@pytest.mark.parametrize("kind,sizes", full_but([("fsdp2", [2, 1])], [("fsdp2", [2, 1]), ("zero2", [2, 2])]), ids=str)
def test_averaging_after_each_step_is_synchronous(ranks: Any, kind: str, sizes: list[int]) -> None:
    """tau = 1 and full pull under plain SGD is data parallelism on the whole batch, also with replicas unequal."""
    for r in ranks(sum(sizes)).run("tests.cases.consensus:synchronous", kind=kind, sizes=sizes):
        assert r["dw"] <= 1e-6 and r["apart"] > 1e-4, r


@pytest.mark.parametrize(("kind", "sizes"), [("fsdp2", [2, 1]), ("ddp", [1, 1, 1])], ids=str)
def test_a_replica_that_has_lost_its_numbers_is_left_out_and_given_the_model(
    ranks: Any, kind: str, sizes: list[int]
) -> None:
    everybody, well = list(range(len(sizes))), [r for r in range(len(sizes)) if r != 1]
    for rank, r in enumerate(ranks(sum(sizes)).run("tests.cases.consensus:healed", kind=kind, sizes=sizes)):
        assert r["told"] == [[everybody, everybody, True], [everybody, well, True], [everybody, everybody, True]], r
        mine = rank == (2 if sizes[0] == 2 else 1)
        assert r["finite"] == [True, True, True, not mine, *[True] * 4], (rank, r)
        assert all(math.isfinite(m) for m in r["momenta"]), r
