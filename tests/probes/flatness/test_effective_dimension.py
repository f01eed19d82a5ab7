"""Effective dimension of eigenvalues and of a density, with its limits."""

from __future__ import annotations

import pytest

from elastic_lsopt import NonFinite, UserError
from elastic_lsopt.probes.flatness.effective_dimension import effective_dimension

pytestmark = pytest.mark.fast


def test_of_eigenvalues() -> None:
    got = effective_dimension([3.0, 1.0, 0.0, -5.0])
    assert got.value == pytest.approx(3 / 4 + 1 / 2) and got.left_out == 2
    assert effective_dimension([3.0, 1.0], regulariser=1e-12).value == pytest.approx(2)  # every direction counts
    assert effective_dimension([3.0], regulariser=3.0).value == pytest.approx(0.5)


def test_of_a_density() -> None:
    """40 % of ten dimensions at 3, the rest at 0."""
    got = effective_dimension([3.0, 0.0], weights=[0.4, 0.6], dimension=10)
    assert got.value == pytest.approx(effective_dimension([3.0] * 4 + [0.0] * 6).value) and got.left_out == 6


def test_bad_input() -> None:
    with pytest.raises(UserError, match=r"^regulariser=0\.0 must be a number > 0\.$"):
        effective_dimension([1.0], regulariser=0.0)
    with pytest.raises(UserError, match=r"^weights has 1 numbers for 2 eigenvalues"):
        effective_dimension([1.0, 2.0], weights=[1.0])
    with pytest.raises(NonFinite):
        effective_dimension([float("nan")])
