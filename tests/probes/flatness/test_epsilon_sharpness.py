"""Epsilon-sharpness: the root of a quadratic equation on a quadratic loss."""

from __future__ import annotations

from math import sqrt

import pytest
import torch
from torch import nn

import elastic_lsopt as lso
from elastic_lsopt import NonFinite, UserError
from elastic_lsopt.probes.flatness.epsilon_sharpness import epsilon_sharpness
from tests.cases.probes.flatness import dense, quadratic

pytestmark = pytest.mark.fast


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_closed_form(size: float) -> None:
    """eta |g|^2 + eta^2/2 g'Hg = epsilon, for short and long gradients."""
    h, w, c = dense(5)
    h, c = size * h, size * c
    space, oracle = quadratic(h, w, c)
    g = h @ w + c
    got = epsilon_sharpness(space, oracle, tolerance=1e-12 if size <= 1 else 1e-9)
    first, second = float(g @ g), float(g @ h @ g)
    eta = (sqrt(first**2 + 2 * second * 0.1) - first) / second
    assert got.value == pytest.approx(1 / (eta * float(g.norm())), rel=1e-7)
    assert got.distance == pytest.approx(1 / got.value) and got.rise == pytest.approx(0.1, abs=1e-9)
    assert got.gradients == 1 and torch.equal(space.weights.tensors[0], w)


def test_within_the_authors_tolerance() -> None:
    got = epsilon_sharpness(*quadratic(*dense(5)))
    assert abs(got.rise - 0.1) <= 1e-6 and got.forwards < 60


def test_a_zero_gradient_and_other_bad_input() -> None:
    h, w, c = dense(3)
    with pytest.raises(UserError, match=r"^the gradient is 0, so epsilon-sharpness has no direction of ascent; .*$"):
        epsilon_sharpness(*quadratic(h, torch.zeros_like(w)))
    for bad in ({"epsilon": 0.0}, {"tolerance": -1.0}):
        with pytest.raises(UserError, match="must be a number > 0"):
            epsilon_sharpness(*quadratic(h, w, c), **bad)
    with pytest.raises(NonFinite):
        epsilon_sharpness(*quadratic(h, w, c, offset=float("inf")))


class Bounded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(2, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 0.05 * torch.tanh(self.w).sum() + 0 * x.sum()


def test_a_loss_that_never_rises_so_far() -> None:
    space, oracle = lso.attach(Bounded(), lambda m, b: m(b[0]), [(torch.zeros(1, 2, dtype=torch.float64),)])
    with pytest.raises(UserError, match=r"^the loss along the gradient never rises by epsilon=0.1; .*$"):
        epsilon_sharpness(space, oracle)
