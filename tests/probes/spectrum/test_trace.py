"""Hutchinson's estimator, Hutch++ and XTrace: exact where they must be, unbiased with honest errors elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_lsopt.errors import NonFinite, UserError
from elastic_lsopt.probes.spectrum.hutchinson import hutchinson
from elastic_lsopt.probes.spectrum.hutchpp import hutchpp
from elastic_lsopt.probes.spectrum.xtrace import xtrace
from tests.cases.probes import spectra
from tests.cases.probes.spectra import of_matrix, symmetric

ALL = pytest.mark.parametrize("probe,samples", [(hutchinson, 36), (hutchpp, 12), (xtrace, 18)])


@pytest.mark.fast
@settings(max_examples=25, derandomize=True)
@given(rank=st.integers(0, 5), more=st.integers(1, 6), seed=st.integers(0, 9))
def test_exact_on_low_rank(rank: int, more: int, seed: int) -> None:
    values = [(-1.0) ** i * (i + 1) for i in range(rank)] + [0.0] * (14 - rank)
    for probe in (hutchpp, xtrace):
        a = of_matrix(symmetric(values, seed), seed)
        found = probe(a.space, None, samples=rank + more, of=a)  # type: ignore[arg-type]
        assert found.value == pytest.approx(sum(values), abs=1e-10), probe.__name__
        assert found.products <= (3 if probe is hutchpp else 2) * (rank + more)


@pytest.mark.fast
def test_xtrace_is_exact_with_as_many_vectors_as_dimensions() -> None:
    """Leaving one out leaves one dimension, in which one vector tells all."""
    a = of_matrix(symmetric([3.0, 1.0, -2.0, 0.5]))
    assert xtrace(a.space, None, samples=4, of=a).value == pytest.approx(2.5, abs=1e-10)  # type: ignore[arg-type]


@pytest.mark.fast
def test_xtrace_is_its_definition() -> None:
    """Leave each vector out, take a QR of the other columns, and estimate what is left with it, resphered."""
    n, m = 20, 6
    matrix = symmetric(torch.linspace(-1, 1, n).pow(3) * 5)
    a = of_matrix(matrix)
    w = torch.stack([spectra.flat(a.gaussian(i)) for i in range(m)], dim=1)
    y = matrix @ w
    each = []
    for i in range(m):
        q, _ = torch.linalg.qr(torch.cat([y[:, :i], y[:, i + 1 :]], dim=1))
        rest = w[:, i] - q @ (q.T @ w[:, i])
        each.append((q.T @ matrix @ q).trace() + (n - m + 1) * (rest @ matrix @ rest) / (rest @ rest))
    found = xtrace(a.space, None, samples=m, of=a)  # type: ignore[arg-type]
    assert found.value == pytest.approx(float(torch.stack(each).mean()), rel=1e-10)
    assert found.standard_error == pytest.approx(float(torch.stack(each).std()) / sqrt(m), rel=1e-8)


@ALL
def test_unbiased_with_an_honest_error(probe: Callable[..., Any], samples: int) -> None:
    """Over 40 seeds: the mean is the trace within four standard errors, the reported error is the spread's size."""
    matrix = symmetric([4.0, -3.0, *torch.linspace(-1, 1.4, 60).tolist()])
    trace, values, errors = float(matrix.trace()), [], []
    for seed in range(40):
        a = of_matrix(matrix, seed)
        found = probe(a.space, None, samples=samples, of=a)
        assert found.products == 36
        values.append(found.value)
        errors.append(found.standard_error)
    v = torch.tensor(values)
    assert abs(float(v.mean()) - trace) < 4 * float(v.std()) / sqrt(len(v))
    assert 0.6 < float(torch.tensor(errors).square().mean().sqrt() / v.std()) < 1.6


def test_hutchinson_has_its_variance() -> None:
    matrix = symmetric(torch.linspace(-1, 2, 40))
    a = of_matrix(matrix)
    m = 1500
    found = hutchinson(a.space, None, samples=m, of=a)  # type: ignore[arg-type]
    variance = 2 * float(matrix.square().sum() - matrix.diagonal().square().sum())
    assert found.standard_error == pytest.approx(sqrt(variance / m), rel=0.1)
    assert abs(found.value - float(matrix.trace())) < 4 * found.standard_error


@pytest.mark.fast
def test_fewer_products_than_hutchinson_for_the_same_error_where_few_eigenvalues_lead() -> None:
    a = of_matrix(symmetric([20.0, 15.0, 10.0, 5.0, *torch.linspace(0, 0.2, 60).tolist()]))
    plain = hutchinson(a.space, None, samples=36, of=a).standard_error  # type: ignore[arg-type]
    assert hutchpp(a.space, None, samples=12, of=a).standard_error < plain / 10  # type: ignore[arg-type]
    assert xtrace(a.space, None, samples=18, of=a).standard_error < plain / 10  # type: ignore[arg-type]


@ALL
def test_a_small_network_and_a_part_of_it(probe: Callable[..., Any], samples: int) -> None:
    space, oracle, h, rows = spectra.small()
    found = probe(space, oracle, samples=samples)
    assert abs(found.value - float(h.trace())) < 4 * found.standard_error
    mine = torch.tensor([name.startswith("2.") for name in rows])
    found = probe(space, oracle, samples=min(samples, 20), parameters="2.*")
    assert abs(found.value - float(h.diagonal()[mine].sum())) < 4 * found.standard_error + 1e-9


@pytest.mark.fast
def test_as_curvlinops() -> None:
    curvlinops = pytest.importorskip("curvlinops")
    matrix = symmetric([9.0, 7.0, -5.0, *torch.linspace(-0.1, 0.2, 60).tolist()])
    a = of_matrix(matrix)
    torch.manual_seed(0)
    theirs = float(curvlinops.hutchpp_trace(matrix, 36))
    ours = hutchpp(a.space, None, samples=12, of=a)  # type: ignore[arg-type]
    assert abs(ours.value - theirs) < 8 * ours.standard_error
    theirs = float(curvlinops.xtrace(matrix, 36))
    ours = xtrace(a.space, None, samples=18, of=a)  # type: ignore[arg-type]
    assert abs(ours.value - theirs) < 12 * ours.standard_error


@pytest.mark.fast
@ALL
def test_bad_input(probe: Callable[..., Any], samples: int) -> None:
    a = of_matrix(torch.eye(4, dtype=torch.float64))
    with pytest.raises(UserError, match="samples=0 must be"):
        probe(a.space, None, samples=0, of=a)
    if probe is not hutchinson:
        with pytest.raises(UserError, match="samples=5 must be between 1 and 4"):
            probe(a.space, None, samples=5, of=a)
    a = of_matrix(torch.full((4, 4), float("nan"), dtype=torch.float64))
    with pytest.raises(NonFinite):
        probe(a.space, None, samples=2, of=a)
