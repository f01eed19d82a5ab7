"""Dropout belongs to the unit of work: the same masks in every pass, on any rank, at any world size."""

from __future__ import annotations

from typing import Any

import pytest

from tests.laws.cover import daily_of

CASES = [("ddp", 2), ("ddp", 3), ("fsdp2", 1), ("fsdp2", 2), ("fsdp2", 3), ("fsdp2-kept", 2), ("hsdp", 4)]


@pytest.mark.long
@pytest.mark.parametrize(
    "kind,world,checkpointing",
    daily_of(
        [
            (place, how)
            for place in CASES
            for how in ("", "reentrant", "non-reentrant")
            # torch's DDP refuses it where it looks for unused parameters
            if not (place[0] == "ddp" and how == "reentrant")
        ],
        fast=lambda kind, world, how: (kind, world) == ("fsdp2", 2),
    ),
)
def test_same_masks(ranks: Any, kind: str, world: int, checkpointing: str) -> None:
    """Against a plain module on one rank without checkpointing: losses and weights of three SAM steps."""
    [alone] = ranks(1).run("tests.cases.dropout:dropout", kind="plain")
    assert alone["passes agree"]
    assert abs(alone["losses"][0] - alone["without"]) > 1e-5, "there was no dropout"
    for r in ranks(world).run("tests.cases.dropout:dropout", kind=kind, checkpointing=checkpointing):
        assert r["passes agree"] and r["random numbers untouched"] and r["loss agrees"] < 1e-12, r
        assert max(abs(a - b) for a, b in zip(r["losses"], alone["losses"], strict=True)) < 1e-12
        assert max(abs(a - b) for a, b in zip(r["weights"], alone["weights"], strict=True)) < 1e-12


@pytest.mark.parametrize("method", ["functional_sam", "m_sam", "rwp"])
def test_same_masks_at_the_logits_and_in_parts(ranks: Any, method: str) -> None:
    [alone] = ranks(1).run("tests.cases.dropout:dropout", kind="plain", method=method)
    how = "" if method == "rwp" else "non-reentrant"  # its wrapper's name would be part of the noise
    for r in ranks(2).run("tests.cases.dropout:dropout", kind="fsdp2", checkpointing=how, method=method):
        assert max(abs(a - b) for a, b in zip(r["losses"], alone["losses"], strict=True)) < 1e-12
        assert max(abs(a - b) for a, b in zip(r["weights"], alone["weights"], strict=True)) < 1e-12


@pytest.mark.fast
def test_each_step_draws_its_own_masks(ranks: Any) -> None:
    [alone] = ranks(1).run("tests.cases.dropout:own_masks")
    assert alone["again"] == 0.0 and alone["next step"] > 1e-3
