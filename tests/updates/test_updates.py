"""Law 1 of the update rules: steps on shards are those of a loop over whole parameters, under every method."""

from __future__ import annotations

from typing import Any

import pytest

from tests.laws.cover import daily, full_but, joined

LIMIT = {"fp32": 1e-6, "fp64": 1e-12}
FRAMEWORK = [("plain", 1), ("ddp", 2), ("fsdp2", 2), ("fsdp2", 3), ("hsdp", 4)]
ZERO = [(f"zero{stage}", world) for stage in (0, 1, 2, 3) for world in (1, 2, 3)]
VECTORS = {
    "lars": 1.0, "lamb": 2.0, "adaptive_memory_sgd": 1.0, "adaptive_memory_adamw": 2.0,
    "schedule_free_sgd": 1.0, "schedule_free_adamw": 2.0,
    "sophia_g": 2.0, "sophia_h": 2.0, "adahessian": 2.0, "sassha": 2.0,
}  # fmt: skip
"""What an update keeps, in vectors: law 7. (Muon and SOAP have tests of their own.)"""
LATER = [*VECTORS][2:]
"""Of which fewer rows are run every day."""
METHODS = ["none", "sam", "asam", "lpf_sgd"]
EVERY_DAY = [
    ("zero1", 2, "sassha", "sam"), ("zero2", 3, "sophia_g", "lpf_sgd"), ("zero3", 2, "adahessian", "none"),
    ("zero0", 2, "sophia_h", "none"), ("zero2", 2, "adaptive_memory_adamw", "asam"),
    ("zero3", 3, "schedule_free_sgd", "sam"),
]  # fmt: skip


def check(out: list[dict[str, float]], update: str, dtype: str) -> None:
    for rank, r in enumerate(out):
        assert r["dw"] <= LIMIT[dtype] and r["dloss"] <= LIMIT[dtype], f"rank {rank}: {r}"
        assert update == "muon" or r["vectors"] == VECTORS[update], f"rank {rank}: {r}"


@pytest.mark.parametrize("update", ["lars", "lamb", "muon"])
@pytest.mark.parametrize("kind,world", FRAMEWORK)
def test_in_fp64(ranks: Any, kind: str, world: int, update: str) -> None:
    case = "tests.cases.updates:reference"
    check(ranks(world).run(case, kind=kind, update=update, dtype="fp64", last=2, clip=0.5, units=5), update, "fp64")


@pytest.mark.parametrize("kind,world,update,method", daily(FRAMEWORK, LATER, METHODS), ids=joined)
def test_later_ones_in_fp64(ranks: Any, kind: str, world: int, update: str, method: str) -> None:
    case = "tests.cases.updates:reference"
    out = ranks(world).run(case, kind=kind, update=update, method=method, dtype="fp64", last=2, clip=0.5, units=5)
    check(out, update, "fp64")


@pytest.mark.parametrize("kind,world,update,method", full_but(EVERY_DAY, ZERO, LATER, METHODS), ids=joined)
def test_later_ones_under_zero(ranks: Any, kind: str, world: int, update: str, method: str) -> None:
    check(ranks(world).run("tests.cases.updates:reference", kind=kind, update=update, method=method), update, "fp32")


@pytest.mark.parametrize("kind,world,update", daily(ZERO, ["lars", "lamb"]), ids=joined)
def test_under_zero(ranks: Any, kind: str, world: int, update: str) -> None:
    check(ranks(world).run("tests.cases.updates:reference", kind=kind, update=update, clip=0.5), update, "fp32")


@pytest.mark.parametrize("kind", ["zero0", "zero1", "zero2", "zero3"])
def test_muon_under_zero(ranks: Any, kind: str) -> None:
    """One rank: the sums' order, which rounding to bf16 would show, is the loop's own."""
    check(ranks(1).run("tests.cases.updates:reference", kind=kind, update="muon"), "muon", "fp32")


@pytest.mark.parametrize("kind,world", [("zero1", 2), ("zero2", 3), ("zero3", 2), ("zero3", 3)])
def test_muon_on_dealt_matrices(ranks: Any, kind: str, world: int) -> None:
    """A step is made of bf16 numbers, where the last bit of a gradient may show as 2^-9 of an element's step."""
    for r in ranks(world).run("tests.cases.updates:reference", kind=kind, update="muon"):
        assert r["dw"] < 6 * 0.02 * 2**-6, r


@pytest.mark.parametrize(
    "kind,world,update,method",
    daily([("ddp", 2), ("fsdp2", 2)], ["lars", "lamb", "muon"], ["sam", "asam", "lpf_sgd"], together=2),
    ids=joined,
)
def test_under_a_method(ranks: Any, kind: str, world: int, update: str, method: str) -> None:
    case = "tests.cases.updates:reference"
    check(ranks(world).run(case, kind=kind, update=update, method=method, dtype="fp64", units=4), update, "fp64")


@pytest.mark.parametrize("update", ["lars", "lamb", "muon", "adaptive_memory_sgd"])
@pytest.mark.parametrize("kind,world", [("ddp", 2), ("fsdp2", 3)])
def test_at_rest(ranks: Any, kind: str, world: int, update: str) -> None:
    for r in ranks(world).run("tests.cases.updates:rested", kind=kind, update=update):
        assert r["dw"] <= 1e-12, r


@pytest.mark.parametrize("kind,world", [("fsdp2", 2), ("zero2", 2)])
def test_norms_cost_one_reduction_per_step_and_an_average_none(ranks: Any, kind: str, world: int) -> None:
    for r in ranks(world).run("tests.cases.updates:counted", kind=kind):
        assert r["adamw"] > 0 and r["ema"] == r["adamw"], r
        assert all(
            r[name] == r["adamw"] + 1 for name in ("lars", "lamb", "adaptive_memory_sgd", "adaptive_memory_adamw")
        ), r
        assert all(r[name] == r["adamw"] for name in ("schedule_free_sgd", "schedule_free_adamw", "soap")), r
