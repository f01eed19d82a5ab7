"""Hugging Face's Trainer with landscape-aware steps: the papers' weights on every backend, stock with method none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.cases import trainer as cases
from tests.cases import trainer_laws as laws
from tests.laws.cover import daily, full_but

NATIVE = ("native", 2)
"""FSDP2 as transformers shards a model on reading it, which takes no LoRA: its adapters would be replicated."""
PLACES = [("plain", 1), ("ddp", 2), ("fsdp2", 2), ("zero0", 2), ("zero1", 2), ("zero2", 2), ("zero3", 2)]


def on(ranks: Callable[[int], Any], world: int, case: Callable[..., Any], **arguments: Any) -> list[dict[str, Any]]:
    """One process is this one, without a process group."""
    if arguments["kind"] == "plain":
        return [case(**arguments)]
    return ranks(world).run(f"{case.__module__}:{case.__name__}", **arguments)


@pytest.mark.parametrize(
    "kind,world,method,clip,lora",
    [
        pytest.param(*place, "sam", 0.5, False, marks=() if place[0] in ("ddp", "fsdp2", "zero3") else full)
        for full in [pytest.mark.full]
        for place in PLACES
    ]
    + [pytest.param("plain", 1, "lpf_sgd", 0.0, True)]
    + [
        pytest.param(*place, method, clip, lora, marks=pytest.mark.full)
        for place in PLACES
        for method in ("none", "sam", "asam", "lpf_sgd")
        for clip, lora in ((0.0, False), (0.5, True))
    ]
    + [
        pytest.param(*NATIVE, method, clip, False, marks=pytest.mark.full)
        for method, clip in (("sam", 0.5), ("none", 0.0), ("asam", 0.0), ("lpf_sgd", 0.5))
    ],
)
def test_weights_are_the_papers(ranks: Any, kind: str, world: int, method: str, clip: float, lora: bool) -> None:
    """fp32, six updates of three micro-batches, the last of two; loss, norms, counts and rates as in a one-pass run."""
    for r in on(ranks, world, laws.against_paper, kind=kind, method=method, clip=clip, lora=lora):
        assert r["dw"] < 1e-6 and r["dloss"] < 2e-6, r
        assert r["moved"] > 1e-2, r
        assert r["lr"] == pytest.approx([cases.LR * (1 - k / 6) for k in range(6)])
        assert r["counts"] == {
            "step_begin": 6, "substep_end": 11, "pre_optimizer_step": 6, "optimizer_step": 6, "step_end": 6,
            "evaluate": 6,
        }  # fmt: skip
        passes = 2 if method in ("sam", "asam") else 1
        assert r["passes"] == (None if method == "none" else passes)
        # Of all ranks and micro-batches, in each call of each pass.
        assert r["items"] == [
            n for n, calls in zip(r["tokens"], (3, 3, 3, 3, 3, 2), strict=True) for _ in range(calls * passes)
        ]
        if kind == "zero0" and method == "none":
            assert r["norms"] == [None] * 6  # DeepSpeed tells of none at stage 0, and the Trainer logs what it tells
        elif clip:  # which the paper's loop has done when its norms are taken
            assert min(r["norms"]) > clip and r["paper_norms"] == pytest.approx([clip] * 6, rel=1e-4)
        else:
            assert r["norms"] == pytest.approx(r["paper_norms"], rel=1e-4)


@pytest.mark.parametrize(
    "kind,world,method", full_but([("plain", 1, "rwp"), ("plain", 1, "sampa")], PLACES, cases.FAMILY)
)
def test_weights_of_the_family_are_the_papers(ranks: Any, kind: str, world: int, method: str) -> None:
    """A part of the batch is a mean over its own tokens, of which micro-batches have unequal counts."""
    for r in on(ranks, world, laws.against_paper, kind=kind, method=method, clip=0.5, lora=method == "nbar"):
        assert r["dw"] < 1e-6 and r["dloss"] < 2e-6 and r["moved"] > 1e-2, r
        assert r["paper_norms"] == pytest.approx([min(0.5, n) for n in r["norms"]], rel=1e-4), r
        assert (r["counts"]["step_end"], r["counts"]["optimizer_step"]) == (6, 6)


@pytest.mark.parametrize(
    "kind,world", daily(PLACES, seed=1)[:1] + [pytest.param(*p, marks=pytest.mark.full) for p in PLACES]
)
def test_method_none_is_the_trainer_itself(ranks: Any, kind: str, world: int) -> None:
    """To the last bit, with dropout, label smoothing and clipping."""
    for r in on(ranks, world, laws.beside_stock, kind=kind):
        assert r == {"dw": 0.0, "logs": True}


@pytest.mark.parametrize(
    "kind,world,method",
    [
        pytest.param(*place, method, marks=() if (place[0], method) == ("ddp", "sam") else pytest.mark.full)
        for place in PLACES
        for method in ("none", "sam")
    ],
)
def test_probes_on_the_way(ranks: Any, kind: str, world: int, method: str) -> None:
    for r in on(ranks, world, laws.measured, kind=kind, method=method):
        assert r["dw"] == 0.0 and r["steps"] == [2, 4], r
        assert r["lambda_max"] == pytest.approx(r["wanted"]["lambda_max"], rel=1e-3)
        assert r["distance"] == pytest.approx(r["wanted"]["distance"], rel=1e-5)


@pytest.mark.parametrize(
    "world,lora,method",
    [
        (1, False, "sam"),
        (1, False, "m_sam"),
        *(pytest.param(2, l, "sam", marks=pytest.mark.full) for l in (False, True)),
    ],
)
def test_trls_trainer(ranks: Any, world: int, lora: bool, method: str) -> None:
    """Through the mixin; each token is counted once, also where the batch is taken in parts, and the first step's
    measures are those of one pass."""
    case = "tests.cases.trainer_laws:sft"
    for r in [laws.sft(lora, method)] if world == 1 else ranks(world).run(case, lora=lora, method=method):
        assert r["dw"] < 1e-6 and r["tokens"] == r["of"], r
        assert r["first_step"][0] == pytest.approx(r["first_step"][1], rel=1e-6)


@pytest.mark.full
def test_names_are_those_without_wrappers(ranks: Any) -> None:
    """FSDP2's activation checkpointing: noise is drawn by name, so it is the paper's only if the names are."""
    config = {"version": 2, "activation_checkpointing": True, "reshard_after_forward": False}
    for r in ranks(2).run("tests.cases.trainer_laws:against_paper", kind="fsdp2", method="lpf_sgd", fsdp_config=config):
        assert r["dw"] < 1e-6 < r["moved"], r


@pytest.mark.parametrize(
    "kind,method",
    [
        pytest.param(kind, method, marks=() if (kind, method) == ("zero2", "sam") else pytest.mark.full)
        for kind in ("zero0", "zero1", "zero2", "zero3")
        for method in ("none", "sam")
    ],
)
def test_the_optimizer_that_was_given_is_the_one_that_steps(ranks: Any, kind: str, method: str) -> None:
    """transformers' own makes another under DeepSpeed, AdamW, and says nothing."""
    for r in ranks(2).run("tests.cases.trainer_laws:against_paper", kind=kind, method=method, clip=0.5, made=True):
        assert r["dw"] < 1e-6 and r["moved"] > 1e-2, r


@pytest.mark.parametrize(
    "kind,alone,method",
    full_but(
        [("zero2", False, "sam"), ("fsdp2", True, "sam")],
        [*((kind, False) for kind in ("ddp", "zero0", "zero1", "zero2", "zero3")),
         *((kind, True) for kind in ("zero3", "fsdp2", "native"))],
        ("none", "sam"),
    ),
)  # fmt: skip
def test_an_update_of_ours_on_ranks(ranks: Any, kind: str, alone: bool, method: str) -> None:
    """LAMB, whose trust ratio is that of a whole parameter; its first steps divide by |g|, where roundings show."""
    wanted = laws.updated("plain", method, alone)
    for r in ranks(2).run("tests.cases.trainer_laws:updated", kind=kind, landscape=method, alone=alone):
        for name, weights in wanted["weights"].items():
            assert torch.allclose(torch.tensor(weights), torch.tensor(r["weights"][name]), atol=1e-5), name
        assert r["norms"] == pytest.approx(wanted["norms"], rel=1e-4)
