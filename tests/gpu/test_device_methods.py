"""Law 1 of the other methods on a device, adapters among them."""

from __future__ import annotations

from typing import Any

import pytest

from tests.gpu.kinds import KINDS, LIMIT, dtype_of
from tests.laws.cover import FAMILY

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("method", FAMILY)
@pytest.mark.parametrize("kind", ["plain", "fsdp2", "zero2", "zero3"])
def test_law_1_of_the_family(ranks: Any, kind: str, method: str) -> None:
    dtype = dtype_of(kind)
    arguments = {"kind": kind, "method": method, "dtype": dtype, "last": 2, "clip": 0.5, "units": 5}
    [r] = ranks(1).run("tests.cases.laws:reference", **arguments)
    assert r["dw"] <= LIMIT[dtype] and r["dloss"] <= LIMIT[dtype], r


@pytest.mark.parametrize("precondition", ["adam", "adam_metric"])
@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "zero2", "zero3"])
def test_preconditioned_sam(ranks: Any, kind: str, precondition: str) -> None:
    dtype, limit = dtype_of(kind), 1e-4 if kind.startswith("zero") else 1e-9
    arguments = {"kind": kind, "dtype": dtype, "base": "adamw", "more": {"precondition": precondition}, "last": 2}
    [r] = ranks(1).run("tests.cases.laws:reference", method="sam", **arguments)
    assert r["dw"] <= limit and r["dloss"] <= limit and r["passes"] == 2, r


@pytest.mark.parametrize("method", ["flat_lora", "nbar"])
@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "zero2", "zero3"])
def test_law_1_of_methods_for_lora(ranks: Any, kind: str, method: str) -> None:
    dtype = dtype_of(kind)
    arguments = {"kind": kind, "method": method, "dtype": dtype, "last": 2, "clip": 0.5, "units": 5}
    [r] = ranks(1).run("tests.cases.laws:reference", extra=["peft"], **arguments)
    assert r["dw"] <= LIMIT[dtype] and r["dloss"] <= LIMIT[dtype], r


@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "zero2", "zero3"])
def test_law_1_of_bi_lora(ranks: Any, kind: str) -> None:
    dtype = dtype_of(kind)
    arguments = {"kind": kind, "dtype": dtype, "last": 2, "clip": 0.5, "units": 5, "extra": ["peft", "adversary"]}
    [r] = ranks(1).run("tests.cases.laws:reference", method="bi_lora", **arguments)
    assert r["dw"] <= LIMIT[dtype] and r["dloss"] <= LIMIT[dtype] and r["passes"] == 1, r


@pytest.mark.parametrize("kind", [*KINDS, "fsdp2-offload", "zero3-offload"])
def test_lora_laws_1_and_3(ranks: Any, kind: str) -> None:
    [r] = ranks(1).run("tests.cases.laws:reference", kind=kind, method="sam", extra=["peft"], last=2, clip=0.5)
    assert r["dw"] <= 1e-6 and r["dloss"] <= 1e-6, r
    [r] = ranks(1).run("tests.cases.laws:returned", kind=kind, extra=["peft"])
    assert r == {"returned": True, "nested": True, "moved": True}
