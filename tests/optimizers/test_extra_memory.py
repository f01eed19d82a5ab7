"""Law 7: the bytes that a method adds to the base, at the peak of a step and between steps, as its docstring states.

The account is the C library's own, of the whole process, read after every torch operation; in fp32 shards of the rank.
Allowed beside what is stated: scratch of one piece (an eighth of the vector), and what gloo's threads free late.
"""

from __future__ import annotations

import ctypes
from typing import Any

import pytest

STATED = {"sam": 1.0, "asam": 2.0, "lpf_sgd": 1.0}


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs glibc 2.33 to count bytes")
@pytest.mark.parametrize("kind,world", [("plain", 1), ("fsdp2", 1), ("ddp", 2), ("fsdp2", 2)])
def test_extra_bytes(ranks: Any, kind: str, world: int) -> None:
    for r in ranks(world).run("tests.cases.memory:extra_bytes", kind=kind, timeout_s=240):
        assert r["base"]["peak"] > 2, "weights and gradient are not in the account"
        for method, stated in STATED.items():
            assert r[method]["peak"] <= stated + (0.15 if world == 1 else 0.5), (method, r)
            assert abs(r[method]["kept"]) < 0.1, (method, r)
