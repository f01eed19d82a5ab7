"""Stochastic Lanczos quadrature against moments and densities of known spectra, and on a part of a network."""

from __future__ import annotations

from math import isnan, pi, sqrt

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_lsopt.errors import UserError
from elastic_lsopt.probes.spectrum.spectral_density import spectral_density
from tests.cases.probes import spectra
from tests.cases.probes.spectra import flat, of_matrix, symmetric


@pytest.mark.fast
@settings(max_examples=20, derandomize=True)
@given(n=st.integers(1, 12), steps=st.integers(1, 12), seed=st.integers(0, 9), copies=st.booleans())
def test_moments_are_those_of_the_vectors(n: int, steps: int, seed: int, copies: bool) -> None:
    """Exact up to degree 2 steps - 1: sum w theta^p = v' A^p v; weights are positive and sum to 1."""
    steps = min(n, steps)
    values = [float(i // 3 if copies else i) - 1.5 for i in range(n)]
    matrix = symmetric(values, seed) / max(1.0, n / 3)
    a = of_matrix(matrix, seed)
    found = spectral_density(a.space, None, vectors=2, steps=steps, of=a)  # type: ignore[arg-type]
    assert found.products <= 2 * steps and found.dimension == n
    for i, (nodes, weights) in enumerate(zip(found.nodes, found.weights, strict=True)):
        v = flat(a.signs(i)) / sqrt(n)
        power = v.clone()
        for p in range(2 * steps):
            moment = sum(w * t**p for t, w in zip(nodes, weights, strict=True))
            assert moment == pytest.approx(float(v @ power), rel=1e-9, abs=1e-9), p
            power = matrix @ power
        assert min(weights) >= 0 and list(nodes) == sorted(nodes)


@pytest.mark.fast
def test_density_trace_and_frobenius_within_their_errors() -> None:
    values = torch.cat(
        [torch.randn(150, generator=torch.Generator().manual_seed(1)).double(), torch.tensor([8.0, 9.0])]
    )
    a = of_matrix(symmetric(values))
    found = spectral_density(a.space, None, vectors=12, steps=30, of=a)  # type: ignore[arg-type]
    n = len(values)
    for p in (1, 2, 3):
        mean, error = found.moment(p)
        assert abs(mean - float((values**p).mean())) < 4 * error + 1e-12
    trace, error = found.trace
    assert abs(trace - float(values.sum())) < 4 * error
    share, error = found.negative
    assert abs(share - float((values < 0).double().mean())) < 4 * error + 0.02
    grid, width = torch.linspace(-4, 10, 200), 0.5
    density, errors = found.density(grid, width)
    exact = torch.exp(-0.5 * ((grid.double()[:, None] - values) / width) ** 2).mean(1) / (width * sqrt(2 * pi))
    assert float(density.sum()) * 14 / 199 == pytest.approx(1.0, abs=0.01)
    assert float(((density - exact).abs() < 4 * errors + 0.01).double().mean()) == 1.0
    assert max(t for nodes in found.nodes for t in nodes) == pytest.approx(9.0, abs=1e-6)
    assert found.products == 12 * 30 and n == found.dimension


@pytest.mark.fast
def test_no_ghosts() -> None:
    """Without re-orthogonalisation the outlier would come back as copies once it has converged."""
    values = torch.cat([torch.linspace(-1, 1, 198), torch.tensor([50.0, 100.0])]).double()
    a = of_matrix(symmetric(values, dtype=torch.float32))
    found = spectral_density(a.space, None, vectors=1, steps=60, of=a)  # type: ignore[arg-type]
    [nodes] = found.nodes
    assert len([t for t in nodes if t > 2]) == 2
    assert isnan(found.trace[1])


def test_a_part_of_a_network() -> None:
    space, oracle, h, rows = spectra.small()
    mine = torch.tensor([name.startswith("2.") for name in rows])
    block = h[mine][:, mine]
    found = spectral_density(space, oracle, vectors=12, steps=len(block), parameters="2.*")
    exact = torch.linalg.eigvalsh(block)
    assert found.dimension == len(block)
    for nodes in found.nodes:
        assert all(float((exact - t).abs().min()) < 1e-8 for t in nodes)
    trace, error = found.trace
    assert abs(trace - float(block.trace())) < 4 * error


@pytest.mark.fast
def test_bad_settings() -> None:
    a = of_matrix(torch.eye(4, dtype=torch.float64))
    with pytest.raises(UserError, match="steps=5 must be between 1 and 4"):
        spectral_density(a.space, None, steps=5, of=a)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="vectors=0"):
        spectral_density(a.space, None, vectors=0, steps=1, of=a)  # type: ignore[arg-type]
    found = spectral_density(a.space, None, vectors=1, steps=3, of=a)  # type: ignore[arg-type]
    assert found.products == 1 and found.nodes[0] == pytest.approx((1.0,))
    with pytest.raises(UserError, match="width=0"):
        found.density(torch.zeros(1), 0.0)
