"""Law 1: the sharded run equals the paper's plain single-process loop on the same global batch."""

from __future__ import annotations

from typing import Any

import pytest

from tests.laws.cover import FAMILY, daily, full_but, joined

LIMIT = {"fp32": 1e-6, "fp64": 1e-12}
METHODS = ("none", "sam", "asam", "lpf_sgd")


def check(out: list[dict[str, float]], dtype: str, passes: int) -> None:
    for rank, r in enumerate(out):
        assert r["dw"] <= LIMIT[dtype], f"rank {rank}: {r}"
        assert r["dloss"] <= LIMIT[dtype], f"rank {rank}: {r}"
        assert r["passes"] == passes, f"rank {rank}: {r}"


@pytest.mark.fast
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["plain", "ddp", "fsdp2"])
def test_one_rank_in_fp64(ranks: Any, kind: str, method: str) -> None:
    out = ranks(1).run("tests.cases.laws:reference", kind=kind, method=method, dtype="fp64", clip=0.5)
    check(out, "fp64", 2 if "sam" in method else 1)


@pytest.mark.fast
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_ranks_in_fp64(ranks: Any, kind: str, method: str) -> None:
    """Three units of 4, 4 and 2 samples on two ranks: an idle slot, exact weights."""
    out = ranks(2).run("tests.cases.laws:reference", kind=kind, method=method, dtype="fp64", last=2, clip=0.5)
    check(out, "fp64", 2 if "sam" in method else 1)


@pytest.mark.fast
@pytest.mark.parametrize("method", FAMILY)
@pytest.mark.parametrize("kind,world", [("plain", 1), ("fsdp2", 2)])
def test_the_family_in_fp64(ranks: Any, kind: str, world: int, method: str) -> None:
    """Five units, the last smaller: parts of unequal weight, idle slots."""
    out = ranks(world).run(
        "tests.cases.laws:reference", kind=kind, method=method, dtype="fp64", last=2, clip=0.5, units=5
    )
    for rank, r in enumerate(out):
        assert r["dw"] <= 1e-12 and r["dloss"] <= 1e-12, f"rank {rank}: {r}"


@pytest.mark.parametrize("more", [{"radius": "parameter"}, {"radius": "row"}, {"every": 2}], ids=str)
@pytest.mark.parametrize("kind,world", [("plain", 1), ("fsdp2", 3), ("ddp", 2)])
def test_sam_variants_in_fp64(ranks: Any, kind: str, world: int, more: dict[str, Any]) -> None:
    out = ranks(world).run("tests.cases.laws:reference", kind=kind, method="sam", dtype="fp64", more=more)
    check(out, "fp64", 1 if "every" in more else 2)


@pytest.mark.parametrize(
    "kind,precondition",
    full_but(
        [("fsdp2", "adam"), ("zero2", "adam_metric"), ("zero3", "adam")],
        ("ddp", "fsdp2", "hsdp", "zero0", "zero1", "zero2", "zero3"),
        ("adam", "adam_metric"),
    ),
)
def test_preconditioned_sam(ranks: Any, kind: str, precondition: str) -> None:
    """From the first step on, where AdamW has no moment yet; which enlarges what fp32 rounds."""
    limit = 1e-4 if kind.startswith("zero") else 1e-9
    more, dtype = {"precondition": precondition}, "fp32" if kind.startswith("zero") else "fp64"
    clip = 0.5 if precondition == "adam" else 0.0
    for r in ranks(2).run(
        "tests.cases.laws:reference", kind=kind, method="sam", dtype=dtype, base="adamw", more=more, last=2, clip=clip
    ):
        assert r["dw"] <= limit and r["dloss"] <= limit and r["passes"] == 2, r


@pytest.mark.parametrize(
    "kind,world,extra,method",
    daily(
        [("ddp", 2), ("fsdp2", 2), ("fsdp2", 3), ("hsdp", 2), ("hsdp", 4), ("fsdp2-kept", 2)],
        [["tied"], ["frozen"], ["unused"], ["tied", "frozen", "unused"]],
        ["sam", "lpf_sgd"],
    ),
    ids=joined,
)
def test_unusual_parameters(ranks: Any, kind: str, world: int, extra: list[str], method: str) -> None:
    out = ranks(world).run(
        "tests.cases.laws:reference", kind=kind, method=method, dtype="fp64", extra=extra, units=5, clip=0.5
    )
    check(out, "fp64", 2 if method == "sam" else 1)


@pytest.mark.parametrize(
    "kind,world,method", daily([("fsdp2", 3), ("ddp", 2), ("hsdp", 4)], FAMILY, together=1), ids=joined
)
def test_unusual_parameters_of_the_family(ranks: Any, kind: str, world: int, method: str) -> None:
    extra = ["tied", "frozen", "unused"]  # which Entropy-SGD's noise leaves alone, too
    out = ranks(world).run(
        "tests.cases.laws:reference", kind=kind, method=method, dtype="fp64", extra=extra, units=5, clip=0.5
    )
    for rank, r in enumerate(out):
        assert r["dw"] <= 1e-12 and r["dloss"] <= 1e-12, f"rank {rank}: {r}"
