"""SAMPa with `halves`: the same as one pass after the other, in half of the passes by the clock; else refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import elastic_lsopt as lso

CASE = "tests.cases.halves:"


@pytest.mark.parametrize(
    "world,units,last,extra,clip",
    [
        (2, 1, None, [], 0.0),  # where one pass after the other leaves rank 1 without work
        (2, 3, 2, ["dropout"], 0.5),
        (4, 2, None, ["unused"], 0.0),
        (4, 5, 2, ["tied"], 0.5),
    ],
)
def test_equals_serial_and_the_papers_loop(
    ranks: Any, world: int, units: int, last: int | None, extra: list[str], clip: float
) -> None:
    base = "undecayed" if "unused" in extra else "momentum"
    for r in ranks(world).run(f"{CASE}beside", units=units, last=last, extra=extra, clip=clip, base=base):
        assert r["dw"] <= 1e-12 and r["losses"] <= 1e-12 and r["norms"] <= 1e-12, r
        assert r.get("paper", 0.0) <= 1e-12 and r["evaluated"] <= 1e-12, r
        assert r["spread"] == 0.0 and r["reports"], r
        assert r["forwards"] == -(-units // (world // 2)), r


@pytest.mark.full
@pytest.mark.parametrize("world,units", [(2, 2), (2, 4), (4, 1), (4, 4), (6, 3)])
def test_in_fp32(ranks: Any, world: int, units: int) -> None:
    for r in ranks(world).run(f"{CASE}beside", units=units, last=3, dtype="fp32"):
        assert r["dw"] <= 1e-6 and r["losses"] <= 1e-6 and r["paper"] <= 1e-6 and r["spread"] == 0.0, r


def test_in_bf16_ranks_stay_together(ranks: Any) -> None:
    for r in ranks(2).run(f"{CASE}bf16"):
        assert r["spread"] == 0.0 and r["dw"] <= 0.05 * r["moved"], r


@pytest.mark.parametrize("heads,zeros", [([0, 1], True), ([1, 1], False)], ids=str)
def test_a_parameter_that_only_some_ranks_use(ranks: Any, heads: list[int], zeros: bool) -> None:
    """Momentum and decay: a rank that thinks a parameter unused would leave it where the others decay it."""
    for r in ranks(4).run(f"{CASE}two_heads", heads=heads, zeros=zeros):
        assert r["dw"] <= 1e-12 and r["spread"] == 0.0, r


def test_a_skipped_step_and_a_change_from_serial(ranks: Any) -> None:
    for r in ranks(2).run(f"{CASE}skipped_and_resumed"):
        assert r["skips"] == [[False, False], [True, True], [False, False]] and r["dw"] <= 1e-12, r


REFUSED = [
    ("ddp", 3, "Unsupported: halves=True: 3 ranks cannot be parted into two halves; start an even number of ranks"),
    ("ddp", 1, "Unsupported: halves=True: one rank cannot be parted into two halves; start an even number of ranks"),
    (
        "fsdp2",
        2,
        "Unsupported: halves=True needs every rank to hold all weights, each half at a point of its own",
    ),
    (
        "hsdp",
        4,
        "Unsupported: halves=True needs every rank to hold all weights, each half at a point of its own",
    ),
    (
        "zero0",
        2,
        "Unsupported: halves=True needs every rank to hold all weights, each half at a point of its own",
    ),
    (
        "zero3",
        2,
        "Unsupported: halves=True needs every rank to hold all weights, each half at a point of its own",
    ),
    ("static", 2, "Unsupported: halves=True: DistributedDataParallel(static_graph=True) averages its first backward"),
]


@pytest.mark.parametrize("kind,world,says", REFUSED, ids=[f"{kind}-{world}" for kind, world, _ in REFUSED])
def test_refused_at_construction(ranks: Any, kind: str, world: int, says: str) -> None:
    for said in ranks(world).run(f"{CASE}refused", kind=kind):
        assert said.startswith(says) and "\n" not in said and said.endswith("set halves=False."), said


def test_refused_in_a_step(ranks: Any) -> None:
    for said in ranks(4).run(f"{CASE}refused_in_a_step"):
        twins = "of the first half got other micro-batches than their twins in the second"
        assert twins in said["plain"] and twins in said["numbered"] and twins in said["one alike"], said
        assert "micro-batch u belongs to rank u mod 2 of each half" in said["misplaced"], said
        assert "halves=True: the forward moves the model's buffer seen" in said["buffer"], said
        assert "halves of the ranks are formed by lso.Engine" in said["oracle"], said


def test_who_takes_closures_refuses() -> None:
    model = torch.nn.Linear(2, 1)
    with pytest.raises(lso.UserError, match=r"^SAMPa\(halves=True\) deals each micro-batch to both halves"):
        lso.LandscapeOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), lso.SAMPa(halves=True))
    with pytest.raises(lso.UserError, match="halves=2 must be true or false"):
        lso.SAMPa(halves=2)  # type: ignore[arg-type]


def test_one_rank_raises() -> None:
    """Of four, so that some wait inside their half and some for a twin. A group of its own: the transport is cut."""
    from tests.processes.ranks import Ranks

    group = Ranks(4)
    try:
        out = group.run(f"{CASE}one_rank_raises", timeout_s=60)
    finally:
        group.stop()
    for rank, r in enumerate(out):
        assert "oh dear" in r["error"] and r["seconds"] < 30 and r["back"], r
        assert (r["kind"] == "ValueError") == (rank == 1), r
