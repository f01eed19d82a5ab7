"""Laws 1 to 5 and 7 where weights, gradients or the optimizer are on the host: FSDP2's CPUOffloadPolicy, ZeRO-Offload.

On a CPU the two places are one. What differs there too is where DeepSpeed puts the gradient, what it keeps of earlier
passes and by which norm it clips; tests/gpu has the same laws where the places are two.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.test_resume import law_4
from tests.elastic.memory.test_reshard import law_5
from tests.laws.cover import full_but

HOST = {"device": "cpu", "pin_memory": False}
OPTIMIZER = {"offload_optimizer": HOST}
BOTH = {**OPTIMIZER, "offload_param": HOST}
ZERO = ("zero1-offload", "zero2-offload", "zero3-offload", "zero3-offload-param", "zero3-offload-weights")
KINDS = ("fsdp2-offload", *ZERO)
METHODS = ("none", "sam", "asam", "lpf_sgd")


@pytest.mark.parametrize(
    "kind,world,method,clip",
    full_but(
        [
            ("fsdp2-offload", 3, "lpf_sgd", 0.5), ("zero2-offload", 2, "sam", 0.5),
            ("zero3-offload-param", 2, "asam", 0.0),
        ],
        KINDS, (1, 2, 3), METHODS, (0.0, 0.5),
    ),
)  # fmt: skip
def test_law_1_the_papers_loop(ranks: Any, kind: str, world: int, method: str, clip: float) -> None:
    """The last micro-batch smaller and, on several ranks, their counts uneven."""
    for r in ranks(world).run(
        "tests.cases.laws:reference", kind=kind, method=method, units=2 * world + 1, last=2, clip=clip
    ):
        assert r["dw"] <= 1e-6 and r["dloss"] <= 1e-6, r
        assert r["passes"] == (2 if "sam" in method else 1), r


@pytest.mark.parametrize("kind,method", full_but([("zero2-offload", "sam")], KINDS, ("none", "sam")))
def test_law_1_with_branches_that_are_used_in_turn(ranks: Any, kind: str, method: str) -> None:
    """A gradient of the first micro-batch alone counts, and none of an earlier pass does."""
    for dw in ranks(2).run("tests.cases.offload:branches_in_turn", kind=kind, method=method):
        assert dw <= 1e-6


@pytest.mark.full
@pytest.mark.parametrize("kind", KINDS)
def test_law_1_with_tied_frozen_and_unused_parameters(ranks: Any, kind: str) -> None:
    extra = ["tied", "frozen", "unused"]
    for r in ranks(2).run(
        "tests.cases.laws:reference", kind=kind, method="sam", extra=extra, base="sgd", units=5, clip=0.5
    ):
        assert r["dw"] <= 1e-6 and r["dloss"] <= 1e-6, r


@pytest.mark.parametrize(
    "stage,zero,sums",
    [
        pytest.param(stage, zero, sums, marks=pytest.mark.full)
        for sums in (None, "fp32")
        for stage, zero in ((1, OPTIMIZER), (2, OPTIMIZER), (3, OPTIMIZER), (3, BOTH))
    ],
    ids=str,
)
def test_law_1_in_bf16_is_as_near_as_the_base(ranks: Any, stage: int, zero: Any, sums: str | None) -> None:
    base, sam = (
        ranks(2).run("tests.cases.zero.steps:bf16_distance", stage=stage, method=m, sums=sums, zero=zero)[0]
        for m in ("none", "sam")
    )
    assert 0 < base < 3e-4
    assert sam <= 2 * base


@pytest.mark.parametrize("stage,bf16", full_but([(2, False)], (1, 2, 3), (False, True)))
def test_an_installed_vector_is_clipped_and_stepped_with(ranks: Any, stage: int, bf16: bool) -> None:
    sums = "fp32" if bf16 else None
    for error in ranks(3).run("tests.cases.zero.steps:installed", stage=stage, bf16=bf16, sums=sums, zero=OPTIMIZER):
        assert error <= 1e-4


@pytest.mark.full
@pytest.mark.parametrize("kind", KINDS)
def test_law_2_at_rest_it_is_the_base(ranks: Any, kind: str) -> None:
    for r in ranks(2).run("tests.cases.laws:rest", kind=kind, method="sam", rest_point={"rho": 0.0}):
        assert r["dw"] <= 1e-6 and r["passes"] == 2, r


@pytest.mark.parametrize(
    "kind,bf16", full_but([("fsdp2-offload", True), ("zero3-offload-param", True)], KINDS, (False, True))
)
def test_law_3_back_to_the_bits(ranks: Any, kind: str, bf16: bool) -> None:
    for r in ranks(2).run("tests.cases.laws:returned", kind=kind, bf16=bf16):
        assert r == {"returned": True, "nested": True, "moved": True}


@pytest.mark.full
@pytest.mark.parametrize("kind", KINDS)
def test_law_3_after_an_exception(ranks: Any, kind: str) -> None:
    for r in ranks(2).run("tests.cases.laws:raised", kind=kind, everywhere=True):
        assert r["back"] and r["refused"] and r["loss"] > 0


@pytest.mark.full
@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("stage,zero", [(1, OPTIMIZER), (2, OPTIMIZER), (3, OPTIMIZER), (3, BOTH)], ids=str)
def test_law_3_all_ranks_raise_in_the_displaced_pass(ranks: Any, stage: int, zero: Any, where: str) -> None:
    zero = {"reduce_bucket_size": 20, **zero}
    for r in ranks(2).run("tests.cases.zero.failures:raised", stage=stage, where=where, ranks=None, zero=zero):
        assert r == {
            "error": "ValueError: on purpose", "goes_on": "0.8100", "local": True, "refused": True, "settled": True,
        }  # fmt: skip


@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.full), 2, pytest.param(3, marks=pytest.mark.full)])
def test_a_step_that_is_not_finite_is_skipped_by_all(ranks: Any, stage: int) -> None:
    """In bf16 DeepSpeed remembers an overflow until it has stepped; the next step is not skipped for it."""
    out = ranks(2).run("tests.cases.zero.failures:non_finite", stage=stage, zero=OPTIMIZER, bf16=True)
    assert out == [{"skipped": 1, "same": True}] * 2


@pytest.mark.parametrize(
    "saved,loaded",
    [
        (("zero2-offload", 2), ("zero2-offload", 2)),
        *(
            pytest.param((kind, 2), (kind, 2), marks=pytest.mark.full)
            for kind in KINDS if kind != "zero2-offload"
        ),
    ],
    ids=str,
)  # fmt: skip
def test_law_4_the_same_layout_goes_on_bit_by_bit(ranks: Any, tmp_path: Path, saved: Any, loaded: Any) -> None:
    dtype = "bf16" if saved[0].startswith("zero") else "fp32"
    assert law_4(ranks, tmp_path, saved, loaded, base="adamw", dtype=dtype) == 0.0


@pytest.mark.parametrize(
    "saved,loaded",
    [
        (("fsdp2-offload", 3), ("zero3-offload", 2)),
        *(
            pytest.param(saved, loaded, marks=pytest.mark.full)
            for saved, loaded in (
                (("zero3-offload-param", 2), ("plain", 1)), (("zero1", 2), ("zero2-offload", 3)),
                (("zero2-offload", 3), ("zero3", 2)), (("ddp", 2), ("fsdp2-offload", 3)),
            )
        ),
    ],
    ids=str,
)  # fmt: skip
def test_law_4_from_and_to_other_places(ranks: Any, tmp_path: Path, saved: Any, loaded: Any) -> None:
    assert law_4(ranks, tmp_path, saved, loaded, base="undecayed") <= 1e-6


@pytest.mark.full
@pytest.mark.parametrize(
    "kind,before,after,dead",
    [
        ("zero2-offload", 3, 2, [0]),
        *(
            pytest.param(*row, marks=pytest.mark.full)
            for row in (
                ("fsdp2-offload", 3, 2, [1]), ("zero1-offload", 2, 4, []), ("zero3-offload", 2, 3, [1]),
                ("zero3-offload-param", 3, 2, [1]),
            )
        ),
    ],
)  # fmt: skip
def test_law_5_what_the_living_hold_becomes_the_new_layout(
    ranks: Any, kind: str, before: int, after: int, dead: list[int]
) -> None:
    law_5(ranks, kind, before, after, dead, base="momentum")


@pytest.mark.full
@pytest.mark.parametrize("sever", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_law_5_an_engine_is_rebuilt_in_the_same_processes(ranks: Any, kind: str, sever: bool) -> None:
    out = ranks(3).run("tests.cases.elastic.elastic_state:rebuild", kind=kind, worlds=(1, 3, 2), sever=sever)
    for rank, r in enumerate(out):
        for losses in r["losses"]:
            assert losses == pytest.approx(out[0]["losses"][0], rel=1e-6), f"rank {rank}"
        assert r["left"] == 0, f"rank {rank}: {r['left']} bytes were not freed"


@pytest.mark.full
@pytest.mark.parametrize("stage,bf16", [(1, False), (2, False), (2, True), (3, False), (3, True)])
def test_law_7_sam_holds_nothing_beyond_the_base(ranks: Any, stage: int, bf16: bool) -> None:
    for r in ranks(2).run("tests.cases.zero.steps:memory", stage=stage, bf16=bf16, zero=OPTIMIZER):
        assert r["masters"] == 0, r
