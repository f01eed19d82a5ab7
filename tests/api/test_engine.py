"""What an engine reports of its perturbations, and what it counts."""

from __future__ import annotations

from typing import Any

import pytest

REMEDIES = ("rho_scale: sqrt_n", "radius: row", "fp32")


@pytest.mark.parametrize("kind,world", [("fsdp2", 2), ("hsdp", 2)])
def test_a_displacement_lost_in_bf16_warns_once(ranks: Any, kind: str, world: int) -> None:
    for r in ranks(world).run("tests.cases.api:warned", kind=kind, rho=1e-4, bf16=True):
        [message] = r["messages"]
        assert all(remedy in message for remedy in REMEDIES) and "\n" not in message
        assert r["cosines"][0] < 0.9 and r["cosines"][1:] == [None] * 3, r


@pytest.mark.parametrize("kind,world", [("fsdp2", 2), ("fsdp2-kept", 3), ("hsdp", 4)])
def test_a_large_displacement_in_bf16_is_seen(ranks: Any, kind: str, world: int) -> None:
    for r in ranks(world).run("tests.cases.api:warned", kind=kind, rho=1.0, bf16=True, ask=True):
        assert r["messages"] == [] and min(r["cosines"]) > 0.98, r


@pytest.mark.parametrize("kind,world", [("plain", 1), ("ddp", 2), ("fsdp2", 2)])
def test_fp32_is_faithful(ranks: Any, kind: str, world: int) -> None:
    for r in ranks(world).run("tests.cases.api:warned", kind=kind, rho=0.05, bf16=False, ask=True):
        assert r["messages"] == [] and min(r["cosines"]) > 1 - 1e-6, r
    for r in ranks(world).run("tests.cases.api:warned", kind=kind, rho=0.05, bf16=False):
        assert r == {"messages": [], "cosines": [None] * 4}


@pytest.mark.parametrize("kind,world", [("ddp", 2), ("fsdp2", 2)])
def test_every_step_reports_when_asked(ranks: Any, kind: str, world: int) -> None:
    for r in ranks(world).run("tests.cases.api:warned", kind=kind, rho=1e-4, bf16=kind == "fsdp2", ask=True):
        assert None not in r["cosines"] and len(r["messages"]) == (kind == "fsdp2"), r
