"""The Frobenius norm against the dense one and its closed-form variance."""

from __future__ import annotations

from math import isnan, sqrt
from typing import Any

import pytest
import torch

from elastic_lsopt.errors import UserError
from elastic_lsopt.probes.spectrum.frobenius import frobenius
from tests.cases.probes import spectra
from tests.cases.probes.spectra import of_matrix, symmetric


@pytest.mark.parametrize("draw", ["signs", "gaussian"])
def test_value_and_error(draw: Any) -> None:
    matrix = symmetric(torch.linspace(-2, 1, 30))
    a = of_matrix(matrix)
    m = 1500
    found = frobenius(a.space, None, samples=m, draw=draw, of=a)  # type: ignore[arg-type]
    square, twice = float(matrix.square().sum()), matrix @ matrix
    variance = 2 * float(twice.square().sum() - (twice.diagonal().square().sum() if draw == "signs" else 0))
    assert found.square_standard_error == pytest.approx(sqrt(variance / m), rel=0.15)
    assert abs(found.square - square) < 4 * found.square_standard_error
    assert found.value == pytest.approx(sqrt(found.square))
    assert found.standard_error == pytest.approx(found.square_standard_error / 2 / found.value)
    assert found.products == m


def test_a_network_and_the_edges() -> None:
    space, oracle, h, _ = spectra.small()
    found = frobenius(space, oracle, samples=60)
    assert abs(found.value - float(h.norm())) < 4 * found.standard_error
    assert isnan(frobenius(space, oracle, samples=1).standard_error)
    with pytest.raises(UserError, match="samples=0"):
        frobenius(space, oracle, samples=0)
    with pytest.raises(UserError, match="draw='ones' is unknown"):
        frobenius(space, oracle, draw="ones")  # type: ignore[arg-type]
