"""Law 2: at its rest point a method equals what it is there, and takes its passes all the same."""

from __future__ import annotations

from typing import Any

import pytest

SAM = ("sam", {"rho": 0.3})
REST: dict[str, tuple[dict[str, Any], float]] = {
    "sam": ({"rho": 0.0}, 2),
    "asam": ({"rho": 0.0}, 2),
    "gsam": ({"rho": 0.0}, 2),
    "friendly_sam": ({"rho": 0.0}, 2),
    "momentum_sam": ({"rho": 0.0}, 1),
    "random_sam": ({"rho": 0.0}, 1),
    "functional_sam": ({"rho": 0.0}, 2),
    "wsam": ({"gamma": 0.0}, 2),
    "ae_sam": ({"lambda1": 1e9, "lambda2": 1e9}, 1),
    "entropy_sgd": ({"inner_steps": 0}, 1),
    "lpf_sgd": ({"gamma": 0.0, "parts": 3, "alpha": 5.0}, 1),
}
"""Where a method is the base, and its passes there."""
IS_SAM: dict[str, dict[str, Any]] = {
    "gsam": {"alpha": 0.0},
    "looksam": {"k": 1},
    "friendly_sam": {"sigma": 0.0},
    "wsam": {"gamma": 0.5, "decouple": False},
    "m_sam": {"parts": 1},
    "esam": {"beta": 1.0, "gamma": 1.0},
    "ae_sam": {"lambda1": -1e9, "lambda2": -1e9},
}
"""Where a method is SAM."""
ROUNDED = ("functional_sam", "gsam", "wsam", "m_sam", "esam", "looksam", "sampa")
"""Whose arithmetic is another order of the same sums."""


def rows() -> list[Any]:
    """Each method on one kind in `make test`, on the other in `make test-all`."""
    out = []
    for i, method in enumerate(REST):
        for j, kind in enumerate(("fsdp2", "ddp")):
            everyday = (i + j) % 2 == 0 or method in ("sam", "asam", "lpf_sgd")
            out.append(pytest.param(kind, method, marks=() if everyday else pytest.mark.full))
    return out


@pytest.mark.parametrize("kind,method", rows())
def test_rest_point(ranks: Any, kind: str, method: str) -> None:
    point, passes = REST[method]
    for r in ranks(2).run("tests.cases.laws:rest", kind=kind, method=method, rest_point=point):
        assert r["dw"] <= (1e-6 if method in ROUNDED else 0.0), r
        assert r["passes"] == passes, r


@pytest.mark.parametrize("method", IS_SAM)
def test_where_it_is_sam(ranks: Any, method: str) -> None:
    point = {"rho": 0.3, **IS_SAM[method]}
    for r in ranks(2).run("tests.cases.laws:rest", kind="fsdp2", method=method, rest_point=point, known=SAM):
        assert r["dw"] <= 1e-6 and r["apart"] > 1e-3, r
        assert r["passes"] == 2, r


def test_sampa_at_rest_and_rwp_without_noise(ranks: Any) -> None:
    """SAMPa with rho = lam = 0 is the base; m-RWP without noise and alpha = 1/2 is the mean of two halves."""
    for method, point in (("sampa", {"rho": 0.0, "lam": 0.0}), ("rwp", {"gamma": 0.0})):
        for r in ranks(2).run("tests.cases.laws:rest", kind="ddp", method=method, rest_point=point, units=4):
            assert r["dw"] <= 1e-6, r
