"""SAM's sharpness on quadratics: one step in closed form, many steps against the exact maximum in the ball."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from torch import Tensor

from elastic_lsopt import NonFinite, UserError
from elastic_lsopt.probes.flatness.sam_sharpness import _checkpoints, sam_sharpness
from tests.cases.probes.flatness import dense, quadratic


@pytest.mark.fast
@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_one_step(norm: Any, adaptive: bool) -> None:
    h, w, c = dense(6)
    space, oracle = quadratic(h, w, c)
    rho, t = 0.3, w.abs() if adaptive else torch.ones_like(w)
    g = h @ w + c
    e = t * (rho * t * g / (t * g).norm() if norm == "l2" else rho * (t * g).sign())
    got = sam_sharpness(space, oracle, rho=rho, norm=norm, adaptive=adaptive)
    assert got.value == pytest.approx(float(g @ e + e @ h @ e / 2), rel=1e-10)
    if not adaptive:
        first = rho * (g.norm() if norm == "l2" else g.abs().sum())
        assert got.value == pytest.approx(float(first + e @ h @ e / 2), rel=1e-10)
    assert (got.gradients, got.forwards) == (1, 1) and torch.equal(space.weights.tensors[0], w)


def highest_in_ball(h: Tensor, g: Tensor, rho: float) -> float:
    """max g'u + u'Hu/2 over |u| <= rho: u = (m - H)^-1 g with m > lambda_max such that |u| = rho."""
    values, v = np.linalg.eigh(h.numpy())
    b = v.T @ g.numpy()
    m = brentq(lambda m: np.linalg.norm(b / (m - values)) - rho, values[-1] + 1e-9, values[-1] + 1e9, xtol=1e-14)
    u = b / (m - values)
    return float(b @ u + (values * u * u).sum() / 2)


@pytest.mark.parametrize("adaptive", [False, True])
def test_many_steps_reach_the_maximum_in_the_l2_ball(adaptive: bool) -> None:
    h, w, c = dense(6)
    t = w.abs() if adaptive else torch.ones_like(w)
    exact = highest_in_ball(t[:, None] * h * t, t * (h @ w + c), 0.7)
    one = sam_sharpness(*quadratic(h, w, c), rho=0.7, adaptive=adaptive)
    many = sam_sharpness(*quadratic(h, w, c), rho=0.7, adaptive=adaptive, steps=40)
    assert one.value < many.value <= exact * (1 + 1e-12) and many.value > 0.9999 * exact


@pytest.mark.parametrize("adaptive", [False, True])
def test_many_steps_reach_the_maximum_in_the_linf_ball(adaptive: bool) -> None:
    """A convex function is highest at a corner of the cube: try all 64."""
    h, w, c = dense(6)
    t = w.abs() if adaptive else torch.ones_like(w)
    corners = 0.7 * t * torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * 6)
    exact = float((corners @ (h @ w + c) + torch.einsum("ki,ij,kj->k", corners, h, corners) / 2).max())
    many = sam_sharpness(*quadratic(h, w, c), rho=0.7, norm="linf", adaptive=adaptive, steps=40, starts=3)
    assert 0.999 * exact < many.value <= exact * (1 + 1e-12)


@pytest.mark.fast
def test_random_starts_find_the_way_up_from_a_minimum() -> None:
    h, w, _ = dense(6)
    space, oracle = quadratic(h, torch.zeros_like(w))
    with pytest.raises(UserError, match=r"^the gradient is 0, so there is no direction of ascent; give starts=1"):
        sam_sharpness(space, oracle, steps=5)
    got = sam_sharpness(space, oracle, rho=0.5, steps=40, starts=1)
    assert got.value == pytest.approx(0.5**2 / 2 * float(torch.linalg.eigvalsh(h)[-1]), rel=1e-3)


@pytest.mark.fast
def test_checkpoints_are_the_evaluators() -> None:
    """Shares of the steps as Croce and Hein print them; counted from above."""
    assert sorted(_checkpoints(1000)) == pytest.approx([220, 410, 570, 700, 800, 870, 930, 990], abs=1)
    assert _checkpoints(1) == set() and min(_checkpoints(20)) == 5


@pytest.mark.fast
def test_bad_input() -> None:
    h, w, c = dense(3)
    for bad in ({"rho": 0.0}, {"steps": 0}, {"starts": -1}):
        with pytest.raises(UserError, match=f"^{next(iter(bad))}=.* must be .*$"):
            sam_sharpness(*quadratic(h, w, c), **bad)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"^norm='l1' is unknown; use l2 or linf.$"):
        sam_sharpness(*quadratic(h, w, c), norm="l1")  # type: ignore[arg-type]
    space, oracle = quadratic(1e150 * h, w, c)
    for steps in (1, 4):
        with pytest.raises(NonFinite):
            sam_sharpness(space, oracle, rho=1e90, steps=steps)
    assert torch.equal(space.weights.tensors[0], w) and oracle.loss() < 1e200  # no settle() is left to do
