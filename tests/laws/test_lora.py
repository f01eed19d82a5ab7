"""Laws 1 to 5 where the space is the adapters of peft's LoRA, and everything else is frozen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.test_resume import law_4
from tests.laws.cover import daily

FRAMEWORK = (("plain", 1), ("ddp", 2), ("fsdp2", 2), ("fsdp2", 3), ("hsdp", 4), ("fsdp2-offload", 2))
ZERO = (*((f"zero{stage}", world) for stage in (0, 1, 2, 3) for world in (1, 2, 3)), ("zero3-offload", 2))
METHODS = ("none", "sam", "asam", "lpf_sgd")
PEFT = ["peft"]


@pytest.mark.parametrize("kind,world,method", daily(FRAMEWORK, METHODS))
def test_law_1_the_papers_loop_in_fp64(ranks: Any, kind: str, world: int, method: str) -> None:
    case = "tests.cases.laws:reference"
    for r in ranks(world).run(case, kind=kind, method=method, dtype="fp64", extra=PEFT, units=5, last=2, clip=0.5):
        assert r["dw"] <= 1e-12 and r["dloss"] <= 1e-12, r
        assert r["passes"] == (2 if "sam" in method else 1), r


@pytest.mark.parametrize("kind,world,method", daily(ZERO[2::3], METHODS[1:3]))
def test_law_1_the_papers_loop_on_zero(ranks: Any, kind: str, world: int, method: str) -> None:
    case = "tests.cases.laws:reference"
    for r in ranks(world).run(case, kind=kind, method=method, extra=PEFT, units=5, last=2, clip=0.5):
        assert r["dw"] <= 1e-6 and r["dloss"] <= 1e-6, r


@pytest.mark.full
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind,world", ZERO)
def test_law_1_on_every_stage(ranks: Any, kind: str, world: int, method: str) -> None:
    case = "tests.cases.laws:reference"
    for r in ranks(world).run(case, kind=kind, method=method, extra=PEFT, units=7, last=2):
        assert r["dw"] <= 1e-6 and r["dloss"] <= 1e-6, r


@pytest.mark.parametrize(
    "kind", ["fsdp2", *(pytest.param(k, marks=pytest.mark.full) for k in ("ddp", "zero2", "zero3"))]
)
def test_law_2_at_rest_it_is_the_base(ranks: Any, kind: str) -> None:
    for r in ranks(2).run("tests.cases.laws:rest", kind=kind, method="sam", rest_point={"rho": 0.0}, extra=PEFT):
        assert r["dw"] <= (1e-6 if "zero" in kind else 0.0) and r["passes"] == 2, r


@pytest.mark.parametrize("kind,bf16", daily(("ddp", "fsdp2", "zero1", "zero2", "zero3"), (False, True), seed=3))
def test_law_3_back_to_the_bits(ranks: Any, kind: str, bf16: bool) -> None:
    how = {"bf16": bf16} if "ddp" not in kind else {}
    for r in ranks(2).run("tests.cases.laws:returned", kind=kind, extra=PEFT, **how):
        assert r == {"returned": True, "nested": True, "moved": True}


@pytest.mark.parametrize(
    "saved,loaded",
    [
        (("fsdp2+peft", 3), ("zero3+peft", 2)),
        *(
            pytest.param(*row, marks=pytest.mark.full)
            for row in (
                (("plain+peft", 1), ("fsdp2+peft", 3)), (("zero3+peft", 2), ("ddp+peft", 2)),
                (("zero2+peft", 2), ("zero2+peft", 3)), (("fsdp2+peft", 2), ("fsdp2-offload+peft", 3)),
            )
        ),
    ],
    ids=str,
)  # fmt: skip
def test_law_4_goes_on_elsewhere(ranks: Any, tmp_path: Path, saved: Any, loaded: Any) -> None:
    """The other model has adapters of another seed, and the same base."""
    assert law_4(ranks, tmp_path, saved, loaded, base="momentum") <= 1e-6


@pytest.mark.parametrize(
    "kind,before,after,dead",
    [
        ("fsdp2+peft", 3, 2, [1]),
        *(
            pytest.param(*row, marks=pytest.mark.full)
            for row in (("ddp+peft", 2, 3, [0]), ("zero2+peft", 3, 2, [0]), ("zero3+peft", 2, 4, []))
        ),
    ],
)  # fmt: skip
def test_law_5_what_the_living_hold_becomes_the_new_layout(
    ranks: Any, kind: str, before: int, after: int, dead: list[int]
) -> None:
    case = "tests.cases.elastic.elastic_state:survive"
    out = ranks(4).run(case, kind=kind, base="adamw", before=before, after=after, dead=dead)
    went_on = [r for r in out if "equal" in r]
    assert len(went_on) == after
    undisturbed = next(r["continued"] for r in out if "continued" in r)
    for r in went_on:
        assert all(r["equal"].values()), r
        assert r["went_on"] == pytest.approx(undisturbed, rel=1e-6)
