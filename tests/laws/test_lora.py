"""Laws 1 to 5 where the space is the adapters of peft's LoRA, and everything else is frozen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.test_resume import law_4
from tests.elastic.memory.test_reshard import law_5
from tests.laws.cover import full_but

FRAMEWORK = (("plain", 1), ("ddp", 2), ("fsdp2", 2), ("fsdp2", 3), ("hsdp", 4), ("fsdp2-offload", 2))
ZERO = (*((f"zero{stage}", world) for stage in (0, 1, 2, 3) for world in (1, 2, 3)), ("zero3-offload", 2))
METHODS = ("none", "sam", "asam", "lpf_sgd", "flat_lora", "nbar")
PEFT = ["peft"]


@pytest.mark.parametrize(
    "kind,world,method",
    full_but([("ddp", 2, "sam"), ("fsdp2", 3, "flat_lora"), ("fsdp2", 2, "nbar")], FRAMEWORK, METHODS),
)
def test_law_1_the_papers_loop_in_fp64(ranks: Any, kind: str, world: int, method: str) -> None:
    case = "tests.cases.laws:reference"
    for r in ranks(world).run(case, kind=kind, method=method, dtype="fp64", extra=PEFT, units=5, last=2, clip=0.5):
        assert r["dw"] <= 1e-12 and r["dloss"] <= 1e-12, r
        assert r["passes"] == (2 if "sam" in method else 1), r


@pytest.mark.parametrize("kind,world,method", full_but([("zero3", 2, "flat_lora")], ZERO[7::3], ("sam", "flat_lora")))
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


@pytest.mark.full
@pytest.mark.parametrize("kind", ["fsdp2", "ddp", "zero2", "zero3"])
def test_law_2_at_rest_it_is_the_base(ranks: Any, kind: str) -> None:
    for r in ranks(2).run("tests.cases.laws:rest", kind=kind, method="sam", rest_point={"rho": 0.0}, extra=PEFT):
        assert r["dw"] <= (1e-6 if "zero" in kind else 0.0) and r["passes"] == 2, r


@pytest.mark.parametrize(
    "kind,bf16", full_but([("zero3", True)], ("ddp", "fsdp2", "zero1", "zero2", "zero3"), (False, True))
)
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


@pytest.mark.full
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
    law_5(ranks, kind, before, after, dead, base="adamw")


# -- the merged weights ----------------------------------------------------------------------------------------------


@pytest.mark.full
@pytest.mark.parametrize("kind", ["fsdp2", "ddp", "zero2", "zero3"])
def test_flat_lora_at_rest_is_the_base(ranks: Any, kind: str) -> None:
    """To rounding: its product of x and W is another call, with the bias added after it."""
    case, rest = "tests.cases.laws:rest", {"sigma": 0.0}
    for r in ranks(2).run(case, kind=kind, method="flat_lora", rest_point=rest, extra=PEFT):
        assert r["dw"] <= 1e-6 and r["passes"] == 1, r


@pytest.mark.parametrize(
    "kind,recompute,bf16",
    [
        ("fsdp2", True, True),
        *(pytest.param(k, *more, marks=pytest.mark.full) for k in ("ddp", "fsdp2", "zero2", "zero3")
          for more in ((False, False), (True, False))),
    ],
)  # fmt: skip
def test_flat_lora_leaves_the_frozen_weights_and_keeps_no_noise(
    ranks: Any, kind: str, recompute: bool, bf16: bool
) -> None:
    """The base is the same bits after three noisy steps, and what backward passes save is what it is without noise."""
    for r in ranks(2).run("tests.cases.lora:noisy", kind=kind, recompute=recompute, bf16=bf16):
        assert r["same"] and r["apart"] > 1e-4, r
        assert r["saved"]["flat"] <= r["saved"]["none"], r


@pytest.mark.full
@pytest.mark.parametrize("kind", ["fsdp2", "zero3"])
def test_recomputed_activations_see_the_same_noise(ranks: Any, kind: str) -> None:
    kept, again = (ranks(2).run("tests.cases.lora:noisy", kind=kind, recompute=r) for r in (False, True))
    assert [r["apart"] for r in kept] == pytest.approx([r["apart"] for r in again], rel=1e-5)


def test_flat_lora_is_for_models_with_adapters(ranks: Any) -> None:
    [said] = ranks(1).run("tests.cases.lora:refused_without_adapters")
    assert said == "the model has no layer with an adapter, so there are no merged weights to move: add lora."
