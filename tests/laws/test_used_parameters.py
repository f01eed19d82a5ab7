"""Micro-batches that use different parameters: right where the ranks use the same ones in turn, else right or refused.

FSDP2 and DeepSpeed reduce what a rank has a gradient for, one after the other as it is ready, so that ranks with
gradients of different parameters, or in different orders, would add the one to the other and say nothing.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.laws.cover import full_but

ALIKE, OPPOSITE, SWAPPED = [0, 0, 1, 1], [0, 1], [0, 1, 1, 0]
"""The head of each micro-batch; two ranks take turns."""


@pytest.mark.parametrize(
    "kind,method",
    full_but([("fsdp2", "sam"), ("zero2", "none")], ["ddp", "fsdp2", "zero0", "zero1", "zero2"], ["none", "sam"]),
)
def test_ranks_that_use_the_same_in_each_round(ranks: Any, kind: str, method: str) -> None:
    for dw in ranks(2).run("tests.cases.used_parameters:distance", kind=kind, heads=ALIKE, method=method):
        assert dw <= 1e-6


@pytest.mark.parametrize("kind,heads", full_but([("ddp", OPPOSITE)], ["ddp", "zero0"], [OPPOSITE, SWAPPED]))
def test_whole_gradients_are_right_whatever_a_rank_uses(ranks: Any, kind: str, heads: list[int]) -> None:
    for dw in ranks(2).run("tests.cases.used_parameters:distance", kind=kind, heads=heads):
        assert dw <= 1e-6


@pytest.mark.parametrize(
    "kind", ["fsdp2", "zero2", *(pytest.param(kind, marks=pytest.mark.full) for kind in ("zero1", "zero2-offload"))]
)
def test_ranks_that_use_different_ones_are_refused(ranks: Any, kind: str) -> None:
    for said in ranks(2).run("tests.cases.used_parameters:distance", kind=kind, heads=OPPOSITE):
        assert "the ranks used different parameters in the same micro-batch" in said


@pytest.mark.parametrize("kind", ["fsdp2", "zero2"])
def test_also_where_they_have_used_the_same_at_the_end(ranks: Any, kind: str) -> None:
    for said in ranks(2).run("tests.cases.used_parameters:distance", kind=kind, heads=SWAPPED):
        assert "different parameters in the same micro-batch" in said


@pytest.mark.parametrize(
    "kind",
    [
        "fsdp2",
        "zero2",
        *(pytest.param(kind, marks=pytest.mark.full) for kind in ("hsdp", "fsdp2-kept", "zero2-offload")),
    ],
)
def test_ranks_that_use_them_in_different_orders_are_refused(ranks: Any, kind: str) -> None:
    """Else the steps were wrong by 0.01 to 0.09, and nothing said so."""
    for said in ranks(2).run("tests.cases.used_parameters:distance", kind=kind, heads=OPPOSITE, turns=True):
        assert "in the same micro-batch, or in another order, where FSDP2 and ZeRO add" in said


@pytest.mark.parametrize("kind", ["zero1", pytest.param("ddp", marks=pytest.mark.full)])
def test_the_order_is_of_no_matter_where_sums_have_their_own(ranks: Any, kind: str) -> None:
    for dw in ranks(2).run("tests.cases.used_parameters:distance", kind=kind, heads=OPPOSITE, turns=True):
        assert dw <= 1e-6


@pytest.mark.full
@pytest.mark.parametrize("heads,turns", [(OPPOSITE, True), (SWAPPED, False)])
def test_zero1_that_overlaps_sums_has_the_order_of_its_gradients(ranks: Any, heads: list[int], turns: bool) -> None:
    told = ranks(2).run(
        "tests.cases.used_parameters:distance", kind="zero1", heads=heads, turns=turns, overlap_comm=True
    )
    for said in told:
        assert "the ranks used different parameters in the same micro-batch, or in another order" in said


def test_zero1_sums_at_the_end_of_a_pass(ranks: Any) -> None:
    for dw in ranks(2).run("tests.cases.used_parameters:distance", kind="zero1", heads=SWAPPED):
        assert dw <= 1e-6


@pytest.mark.parametrize("kind", ["fsdp2", pytest.param("ddp", marks=pytest.mark.full)])
def test_looksams_direction_leaves_alone_what_the_step_does_not_use(ranks: Any, kind: str) -> None:
    """The direction is kept of a step with head 0, and serves one with head 1."""
    for dw in ranks(2).run(
        "tests.cases.used_parameters:distance", kind=kind, heads=[0, 0], then=[1, 1], method="looksam"
    ):
        assert dw <= 1e-6
