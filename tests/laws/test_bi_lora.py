"""Bi-LoRA on every layout: the paper's loop, its rest, the length of its adversary, and the model without it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.test_resume import law_4
from tests.laws.cover import full_but

FRAMEWORK = (("plain", 1), ("ddp", 2), ("fsdp2", 2), ("fsdp2", 3), ("fsdp2-kept", 2), ("hsdp", 4), ("fsdp2-offload", 2))
ZERO = (
    *((f"zero{stage}", world) for stage in (0, 1, 2, 3) for world in (1, 2, 3)),
    *((f"zero{k}", 2) for k in ("2-offload", "3-offload", "3-offload-param")),
)
PEFT = ["peft", "adversary"]
REFERENCE = "tests.cases.laws:reference"
CASES = "tests.cases.bi_lora:"


@pytest.mark.parametrize(
    "method,base,kind,world",
    full_but([("bi_lora", "momentum", "ddp", 2), ("bi_lora", "momentum", "fsdp2", 3)],
             ("bi_lora",), ("momentum", "adamw"), FRAMEWORK),
)  # fmt: skip
def test_law_1_the_papers_loop_in_fp64(ranks: Any, method: str, base: str, kind: str, world: int) -> None:
    more = {"extra": PEFT, "units": 5, "last": 2, "clip": 0.5, "base": base}
    for r in ranks(world).run(REFERENCE, kind=kind, method=method, dtype="fp64", **more):
        assert r["dw"] <= 1e-12 and r["dloss"] <= 1e-12 and r["passes"] == 1, r


@pytest.mark.parametrize(
    "method,kind,world", full_but([("bi_lora", "zero2", 2), ("bi_lora", "zero3", 2)], ("bi_lora",), ZERO)
)
def test_law_1_the_papers_loop_on_zero(ranks: Any, method: str, kind: str, world: int) -> None:
    more = {"extra": PEFT, "units": 5, "last": 2, "clip": 0.5}
    for r in ranks(world).run(REFERENCE, kind=kind, method=method, **more):
        assert r["dw"] <= 1e-6 and r["dloss"] <= 1e-6 and r["passes"] == 1, r


@pytest.mark.parametrize(
    "kind,base,clip",
    full_but([("ddp", "momentum", 0.5)], ("ddp", "fsdp2", "zero2", "zero3"), ("momentum", "adamw"), (0.0, 0.5)),
)
def test_law_2_at_rest_it_is_lora(ranks: Any, kind: str, base: str, clip: float) -> None:
    """Of a model that has no second adapter: to the bit where each parameter has a place of its own."""
    for r in ranks(2).run(CASES + "at_rest", kind=kind, base=base, clip=clip):
        assert r["dw"] <= (1e-6 if "zero" in kind else 0.0) and r["up"] == 0.0, r
        assert "zero" in kind or not r["dloss"], r


@pytest.mark.parametrize(
    "kind,dtype,bf16",
    full_but([("fsdp2", "fp32", False)], ("ddp", "fsdp2", "zero2", "zero3"), ("fp32",), (False, True))
    + full_but([], ("plain", "ddp", "fsdp2"), ("fp64",), (False,)),
)  # fmt: skip
def test_the_adversary_is_never_longer_than_rho(ranks: Any, kind: str, dtype: str, bf16: bool) -> None:
    """It is shorter in the first steps, while its product grows from 0, and then as long as it may be."""
    world = 1 if kind == "plain" else 2
    [*alike] = ranks(world).run(CASES + "lengths", kind=kind, dtype=dtype, bf16=bf16 and kind != "ddp")
    for found in alike:
        assert all(0 < c <= 0.05 for c in found), found
        assert found[-1] == pytest.approx(0.05, rel=1e-6) and found[0] < 0.04, found


@pytest.mark.parametrize(
    "kind,bf16", full_but([("fsdp2", False), ("zero2", False)], ("ddp", "fsdp2", "zero2", "zero3"), (False, True))
)
def test_the_model_is_without_it(ranks: Any, kind: str, bf16: bool) -> None:
    bf16 = bf16 and kind.startswith("zero")
    near, far = (2e-2, 3e-2) if bf16 else (1e-5, 1e-2)
    for r in ranks(2).run(CASES + "without_it", kind=kind, bf16=bf16):
        assert r["name"] == "bi_lora" and r["back"], r
        assert r["alone"] <= near and r["ema"] <= near and min(r["trained"], r["mean"]) > far, r


def _numbers(told: Any, at: str = "") -> dict[str, float]:
    """Every number in the answer of a measure, by its place; its time is none."""
    rows = told.items() if isinstance(told, dict) else enumerate(told) if isinstance(told, list) else ()
    out = {f"{at}": float(told)} if isinstance(told, int | float) else {}
    for key, value in rows:
        if key != "seconds":
            out |= _numbers(value, f"{at}/{key}")
    return out


@pytest.mark.parametrize(
    "kind,products",
    full_but([("zero2", "kept")], ("ddp", "fsdp2", "hsdp", "zero0", "zero2", "zero3"),
             ("kept", "blockwise", "differences")),
)  # fmt: skip
def test_measures_are_those_of_lora(ranks: Any, kind: str, products: str) -> None:
    """The adversary is a direction of no measure, and no part of a norm."""
    near = 2e-2 if products == "differences" else 2e-4
    for r in ranks(2).run(CASES + "measured", kind=kind, products=products):
        ours, wanted = _numbers(r["ours"]), _numbers(r["wanted"])
        assert len(ours) > 20 and ours.keys() == wanted.keys(), r
        assert ours == pytest.approx(wanted, rel=near, abs=near), r


@pytest.mark.parametrize("kind", full_but([("fsdp2",), ("zero3",)], ("ddp", "fsdp2", "zero2", "zero3")))
def test_a_step_that_is_left_out_moves_nothing(ranks: Any, kind: str) -> None:
    for r in ranks(2).run(CASES + "left_out", kind=kind):
        assert r == {"skipped": True, "same": True, "then": True}


@pytest.mark.parametrize(
    "kind,world",
    [pytest.param("plain", 1, marks=pytest.mark.full), pytest.param("ddp", 2, marks=pytest.mark.full), ("fsdp2", 2)],
)
def test_a_users_own_loop(ranks: Any, kind: str, world: int) -> None:
    for r in ranks(world).run(CASES + "own_loop", kind=kind):
        assert r["dw"] <= 1e-12 and r["dloss"] <= 1e-12, r


@pytest.mark.parametrize(
    "saved,loaded",
    [
        (("fsdp2", 3), ("zero3", 2)),
        *(
            pytest.param(*row, marks=pytest.mark.full)
            for row in (
                (("plain", 1), ("fsdp2", 3)),
                (("zero3", 2), ("ddp", 2)),
                (("zero2", 2), ("zero2", 3)),
            )
        ),
    ],
    ids=str,
)  # fmt: skip
def test_law_4_goes_on_elsewhere(ranks: Any, tmp_path: Path, saved: Any, loaded: Any) -> None:
    there, here = ((f"{kind}+peft+adversary", world) for kind, world in (saved, loaded))
    assert law_4(ranks, tmp_path, there, here, base="momentum", method="bi_lora") <= 1e-6


REFUSED = {
    "none": "the model has no adapter called 'adversary', which is to move its weights: a job's lora block makes it",
    "no adapter": "the model has no adapter called 'adversary'",
    "frozen": "the adapter 'adversary' of layer first is not trained; call layer.set_adapter(['default', 'adversary'])",
    "inactive": "the adapter 'adversary' of layer first is not trained",
    "alone": "nothing is trained beside the adapter 'adversary'",
    "rank": "the adapter 'adversary' has rank 3 and bi_lora r=4; give r=3",
    "schedule_free": "bi_lora moves weights when the base has stepped, and schedule_free keeps them in other",
    "embedding": "the adapter 'adversary' has words.lora_embedding_A, which is no factor of a product",
    "whole": "the adapter 'adversary' has head.modules_to_save, which is no factor of a product",
    "dora": "layer first is DoRA: an adversary is tested as plain LoRA on linear layers",
    "bias": "layer first has lora_bias: an adversary is a product of two matrices",
    "closure": "the model has no adapter called 'adversary'",
}


def test_what_is_refused(ranks: Any) -> None:
    [said] = ranks(1).run(CASES + "refused")
    assert said.pop("some") == "nothing"  # the model that the others differ from
    assert said.keys() == REFUSED.keys()
    for name, line in said.items():
        assert line.startswith(REFUSED[name]) and "\n" not in line, (name, line)
