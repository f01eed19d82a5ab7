"""The noise scale on gradients with a known covariance: unbiased parts, an error that is the spread."""

from __future__ import annotations

import pytest
import torch

import elastic_lsopt as lso
from elastic_lsopt import NonFinite, UserError
from elastic_lsopt.probes.noise.noise_scale import from_gram, noise_scale
from tests.cases.probes.flatness import Quadratic, dense, mean, quadratic

pytestmark = pytest.mark.fast
N = 6


def covariance() -> torch.Tensor:
    """A square root of one sample's covariance."""
    torch.manual_seed(9)
    return torch.randn(N, N, dtype=torch.float64)


def test_of_a_model_whose_samples_are_the_noise() -> None:
    """The gradient of a sample x is H w + c + x."""
    h, w, c = dense(N)
    root = covariance()
    torch.manual_seed(10)
    batches = [torch.randn(b, N, dtype=torch.float64) @ root.T for b in [20, 30] * 15]
    model = Quadratic(h, w, c)
    space, whole = lso.attach(model, mean, [(x,) for x in batches])
    got = noise_scale(space, [lso.attach(model, mean, [(x,)])[1] for x in batches], curvature=whole)
    s, g = root @ root.T, h @ w + c
    assert abs(got.trace - float(s.trace())) < 4 * got.trace_error < float(s.trace())
    assert abs(got.square - float(g @ g)) < 4 * got.square_error
    assert abs(got.value - float(s.trace() / (g @ g))) < 4 * got.standard_error
    # The pooled estimates of the same samples, by plain arithmetic.
    gs, sizes = torch.stack([g + x.mean(0) for x in batches]), torch.tensor([len(x) for x in batches])
    m = (sizes[:, None] * gs).sum(0) / sizes.sum()
    about = (h @ (gs - m).T).T
    trace = float((sizes * (about * (gs - m)).sum(1)).sum() / (len(batches) - 1))
    assert got.hessian_value == pytest.approx(trace / (float(m @ h @ m) - trace / int(sizes.sum())), rel=1e-9)
    assert got.critical_batch == got.hessian_value
    assert got.efficiency(int(1e9)) == pytest.approx(1, abs=1e-6)
    assert (got.gradients, got.products) == (30, 30)


@pytest.mark.long
def test_unbiased_and_with_a_true_error() -> None:
    """600 experiments with 12 batches of 3 sizes."""
    root, g = covariance(), torch.full((N,), 2.0, dtype=torch.float64)
    s, sizes = root @ root.T, [5, 10, 30] * 4
    torch.manual_seed(11)
    b = torch.tensor(sizes, dtype=torch.float64)
    found = []
    for _ in range(600):
        gs = g + (torch.randn(12, N, dtype=torch.float64) @ root.T) / b.sqrt()[:, None]
        found.append(from_gram(gs @ gs.T, sizes))
    value, error, trace, square, trace_error, square_error = torch.tensor(found, dtype=torch.float64).T
    truth = {"trace": (trace, trace_error, s.trace()), "square": (square, square_error, g @ g)}
    for name, (x, e, exact) in truth.items():
        assert abs(x.mean() - exact) < 4 * x.std() / 600**0.5, name
        assert float(e.square().mean().sqrt()) == pytest.approx(float(x.std()), rel=0.25), name
    assert abs(value.mean() - s.trace() / (g @ g)) < 4 * value.std() / 600**0.5
    assert float(error.square().mean().sqrt()) == pytest.approx(float(value.std()), rel=0.3)


def test_without_noise_and_without_signal() -> None:
    same = quadratic(*dense(N))
    got = noise_scale(same[0], [same[1]] * 4)
    assert abs(got.value) < 1e-12 and abs(got.trace) < 1e-12
    opposite = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64)
    value, *_, square, _, _ = from_gram(opposite, [8, 8])  # type: ignore[misc]
    assert value == float("inf") and square < 0


def test_bad_input() -> None:
    h, w, c = dense(N)
    space, oracle = quadratic(h, w, c)
    with pytest.raises(UserError, match=r"^the noise scale is measured between batches: got 1, needs at least 2.$"):
        noise_scale(space, [oracle])
    with pytest.raises(UserError, match=r"^samples=\[8, 0\] must hold one number > 0 for each of the 2 batches.$"):
        noise_scale(space, [oracle, oracle], samples=[8, 0])
    flat, still = quadratic(h, torch.zeros_like(w))
    with pytest.raises(UserError, match=r"^the gradient of every batch is 0"):
        noise_scale(flat, [still, still])
    with pytest.raises(NonFinite):
        from_gram(torch.full((2, 2), float("nan"), dtype=torch.float64), [1, 1])
