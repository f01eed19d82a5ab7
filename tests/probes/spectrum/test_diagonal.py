"""The diagonal against the dense one, its error against the closed form."""

from __future__ import annotations

from math import isnan, sqrt

import pytest
import torch

from elastic_lsopt.errors import UserError
from elastic_lsopt.probes.spectrum.diagonal import diagonal
from elastic_lsopt.probes.spectrum.operator import operator
from tests.cases.probes import spectra
from tests.cases.probes.spectra import flat, of_matrix, symmetric


def test_error_is_the_closed_form() -> None:
    matrix = symmetric(torch.linspace(-2, 3, 30))
    a = of_matrix(matrix)
    m = 1500
    found = diagonal(a.space, None, samples=m, of=a)  # type: ignore[arg-type]
    away = flat(found.values) - matrix.diagonal()
    expected = sqrt(float(matrix.square().sum() - matrix.diagonal().square().sum()) / m)
    assert found.standard_error == pytest.approx(expected, rel=0.1)
    assert float(away.norm()) == pytest.approx(expected, rel=0.5)
    assert found.relative_standard_error == pytest.approx(found.standard_error / float(flat(found.values).norm()))


@pytest.mark.fast
def test_the_mean_and_spread_of_a_plain_loop() -> None:
    space, oracle, h, _ = spectra.small()
    found = diagonal(space, oracle, samples=5)
    signs = [flat(operator(space, oracle).signs(i)) for i in range(5)]
    each = torch.stack([z * (h @ z) for z in signs])
    assert torch.allclose(flat(found.values), each.mean(0), atol=1e-12)
    assert found.standard_error == pytest.approx(float((each.var(0) / 5).sum().sqrt()), rel=1e-9)


@pytest.mark.fast
def test_exact_on_a_diagonal_matrix_and_edges() -> None:
    values = torch.tensor([1.0, -2.0, 0.0, 4.0]).double()
    a = of_matrix(torch.diag(values))
    found = diagonal(a.space, None, samples=1, of=a)  # type: ignore[arg-type]
    assert torch.equal(flat(found.values), values) and isnan(found.standard_error)
    with pytest.raises(UserError, match="samples=0"):
        diagonal(a.space, None, samples=0, of=a)  # type: ignore[arg-type]
