"""The LPF measure on quadratics, where the expectation and each draw have a closed form."""

from __future__ import annotations

import pytest
import torch

from elastic_lsopt import NonFinite, UserError
from elastic_lsopt.probes.flatness.lpf import lpf
from elastic_lsopt.probes.spectrum.operator import operator
from tests.cases.probes.flatness import dense, quadratic

pytestmark = pytest.mark.fast


def test_each_draw_and_both_means() -> None:
    h, w, c = dense(6)
    space, oracle = quadratic(h, w, c, offset=9.0)
    got, sigma = lpf(space, oracle, sigma=0.3, draws=5), 0.3
    a = operator(space, oracle)
    z = torch.stack([a.gaussian(i).tensors[0] for i in range(5)])
    loss = 0.5 * w @ h @ w + c @ w + 9.0
    rises = sigma * z @ (h @ w + c) + sigma**2 / 2 * torch.einsum("ki,ij,kj->k", z, h, z)
    assert got.value == pytest.approx(float(loss + rises.mean()), rel=1e-12)
    assert got.standard_error == pytest.approx(float(rises.std() / 5**0.5), rel=1e-10)
    assert got.relative == pytest.approx(float((rises.abs() / loss).mean()), rel=1e-10)
    assert got.loss == pytest.approx(float(loss)) and got.forwards == 6
    assert torch.equal(space.weights.tensors[0], w)


def test_excess_is_half_the_trace_times_the_variance() -> None:
    h, w, _ = dense(6)
    space, oracle = quadratic(h, w, -h @ w)  # at the minimum: no first order
    got = lpf(space, oracle, sigma=0.1, draws=150)
    expected = 0.1**2 / 2 * float(h.trace())
    assert abs(got.excess - expected) < 4 * got.standard_error < expected


@pytest.mark.parametrize("bad", [{"sigma": 0.0}, {"sigma": -1.0}, {"sigma": float("nan")}, {"draws": 0}])
def test_bad_settings(bad: dict[str, float]) -> None:
    with pytest.raises(UserError, match=f"^{next(iter(bad))}=.* must be .*$"):
        lpf(*quadratic(*dense(3)), **bad)  # type: ignore[arg-type]


def test_a_loss_that_is_not_finite() -> None:
    h, w, c = dense(3)
    with pytest.raises(NonFinite, match="the loss at the weights is nan"):
        lpf(*quadratic(h, w, c, offset=float("nan")))
    space, oracle = quadratic(h, w, c)
    with pytest.raises(NonFinite, match=r"under noise of sigma=1e\+200 is (inf|nan)"):
        lpf(space, oracle, sigma=1e200)
    assert torch.equal(space.weights.tensors[0], w) and oracle.loss() < 100
