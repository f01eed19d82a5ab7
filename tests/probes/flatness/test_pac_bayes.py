"""The PAC-Bayes measure on an isotropic quadratic: sigma is the root of a quadratic equation for given draws."""

from __future__ import annotations

from math import log, sqrt

import pytest
import torch

from elastic_lsopt import UserError
from elastic_lsopt.probes.flatness.pac_bayes import pac_bayes
from elastic_lsopt.probes.spectrum.operator import operator
from tests.cases.probes.flatness import dense, quadratic

pytestmark = pytest.mark.fast


@pytest.mark.long
@pytest.mark.parametrize("distant", [False, True])
def test_closed_form(distant: bool) -> None:
    a, n, m = 3.0, 8, 10
    torch.manual_seed(1)
    w = torch.randn(n, dtype=torch.float64)
    space, oracle = quadratic(a * torch.eye(n, dtype=torch.float64), w)
    initial = 0.5 * space.weights.clone() if distant else space.zeros()
    got = pac_bayes(space, oracle, initial=initial, samples=5000, draws=m, tolerance=1e-13)
    op = operator(space, oracle)
    z = torch.stack([op.gaussian(i).tensors[0] for i in range(m)])
    first, second = float((z @ w).mean()) * a, float(z.square().sum(1).mean()) * a / 2
    sigma = (-first + sqrt(first**2 + 4 * second * 0.1)) / (2 * second)
    square = float(w.square().sum()) / (4 if distant else 1)
    assert got.sigma == pytest.approx(sigma, rel=1e-9) and got.square_distance == pytest.approx(square)
    assert got.value == pytest.approx(square / (4 * sigma**2) + log(2 * 5000 / 1e-6), rel=1e-9)
    rises = sigma * a * z @ w + sigma**2 * a / 2 * z.square().sum(1)
    error = square / (4 * sigma**2) * float(rises.std()) / sqrt(m) / 0.1
    assert got.standard_error == pytest.approx(error, rel=1e-6)


def test_within_the_authors_tolerance_and_with_the_batch_as_n() -> None:
    space, oracle = quadratic(*dense(5))
    got = pac_bayes(space, oracle, initial=space.zeros())
    assert abs(got.rise - 0.1) <= 1e-6
    assert got.value == pytest.approx(got.square_distance / (4 * got.sigma**2) + log(2 * 2 / 1e-6))


@pytest.mark.long
def test_bad_settings_and_a_loss_that_does_not_rise() -> None:
    h, w, _ = dense(3)
    space, oracle = quadratic(h, w)
    for bad in ({"rise": 0.0}, {"tolerance": float("nan")}, {"draws": 0}, {"samples": 0}):
        with pytest.raises(UserError, match=f"^{next(iter(bad))}=.* must be .*$"):
            pac_bayes(space, oracle, initial=space.zeros(), **bad)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"^noise of up to sigma=100 never raises the loss by rise=0.1; .*$"):
        flat, there = quadratic(1e-9 * h, w)
        pac_bayes(flat, there, initial=flat.zeros())
