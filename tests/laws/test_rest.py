"""Law 2: at its rest point a method equals the same engine with no method, and takes its passes all the same."""

from __future__ import annotations

from typing import Any

import pytest

REST = {
    "sam": ({"rho": 0.0}, 2),
    "asam": ({"rho": 0.0}, 2),
    "lpf_sgd": ({"gamma": 0.0, "parts": 3, "alpha": 5.0}, 1),
}


@pytest.mark.parametrize("method", REST)
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_rest_point(ranks: Any, kind: str, method: str) -> None:
    point, passes = REST[method]
    for r in ranks(2).run("tests.cases.laws:rest", kind=kind, method=method, rest_point=point):
        assert r["dw"] == 0.0, r
        assert r["passes"] == passes, r
