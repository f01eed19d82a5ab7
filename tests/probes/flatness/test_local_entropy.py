"""Local entropy against its formula for given draws, and mu_LE against Entropy-SGD's inner loop written out."""

from __future__ import annotations

from math import log, pi, sqrt

import pytest
import torch

from elastic_lsopt import NonFinite, UserError
from elastic_lsopt.probes.flatness.local_entropy import local_entropy, local_entropy_gradient
from elastic_lsopt.probes.spectrum.operator import operator
from tests.cases.probes.flatness import dense, quadratic

pytestmark = pytest.mark.fast


def test_as_coded() -> None:
    h, w, c = dense(5)
    space, oracle = quadratic(h, w, c, offset=1000.0)  # exp(-1000) is 0: the sum must be formed in logarithms
    got, gamma, m = local_entropy(space, oracle, gamma=4.0, draws=6), 4.0, 6
    a = operator(space, oracle)
    out = []
    for i in range(m):
        x = w + a.gaussian(i).tensors[0] / gamma
        out.append(-(0.5 * x @ h @ x + c @ x + 1000.0))
    inside = torch.logsumexp(torch.stack(out), 0) + log(1 / m)
    assert got.value == pytest.approx(-float(inside + 5 / 2 * log(2 * pi) - log(gamma**0.5)), rel=1e-12)
    assert got.free_energy == pytest.approx(-float(inside), rel=1e-12)


def test_standard_error_covers_the_exact_value() -> None:
    """-log E exp(-L) on a quadratic at its minimum: log det (1 + H / gamma^2) / 2."""
    h, w, _ = dense(4)
    got = local_entropy(*quadratic(h, torch.zeros_like(w)), gamma=1.5, draws=200)
    exact = 0.5 * float(torch.logdet(torch.eye(4, dtype=torch.float64) + h / 1.5**2))
    assert abs(got.free_energy - exact) < 4 * got.standard_error < 0.3 * exact


def test_gradient_as_coded() -> None:
    h, w, c = dense(5)
    space, oracle = quadratic(h, w, c)
    got = local_entropy_gradient(space, oracle, steps=7, g0=0.3, noise=0.2)
    a = operator(space, oracle)
    x, mu, lr = w.clone(), w.clone(), 0.1
    for i in range(7):
        dw = h @ x + c - 0.3 * (w - x) + 0.2 / sqrt(0.5 * lr) * a.gaussian(i).tensors[0]
        x = x - lr * dw
        mu = 0.75 * mu + 0.25 * x
    assert got.value == pytest.approx(float((w - mu).norm()), rel=1e-12)
    assert got.gradients == 7 and torch.equal(space.weights.tensors[0], w)


def test_bad_input() -> None:
    h, w, c = dense(3)
    for bad in ({"gamma": 0.0}, {"draws": 0}):
        with pytest.raises(UserError, match="must be"):
            local_entropy(*quadratic(h, w, c), **bad)  # type: ignore[arg-type]
    for bad in ({"steps": 0}, {"g0": -1.0}, {"noise": float("nan")}):
        with pytest.raises(UserError, match=f"^{next(iter(bad))}=.* must be .*$"):
            local_entropy_gradient(*quadratic(h, w, c), **bad)  # type: ignore[arg-type]
    space, oracle = quadratic(1e150 * h, w, c)
    with pytest.raises(NonFinite):
        local_entropy_gradient(space, oracle)
    assert torch.equal(space.weights.tensors[0], w) and oracle.loss() > 0  # no settle() is left to do
