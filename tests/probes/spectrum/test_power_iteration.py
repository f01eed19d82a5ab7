"""Power iteration against dense eigenvalues, by magnitude and with deflation."""

from __future__ import annotations

import pytest
import torch

from elastic_lsopt.errors import UserError
from elastic_lsopt.probes.spectrum.power_iteration import power_iteration
from tests.cases.probes.spectra import flat, of_matrix, symmetric


@pytest.mark.fast
def test_by_magnitude_of_either_sign() -> None:
    matrix = symmetric([5.0, -4.0, 3.0, *torch.linspace(-1, 1, 20).tolist()])
    a = of_matrix(matrix)
    found = power_iteration(a.space, None, k=3, tolerance=1e-12, vectors=True, of=a)  # type: ignore[arg-type]
    assert found.eigenvalues == pytest.approx((5.0, -4.0, 3.0), rel=1e-6)
    assert found.converged and found.vectors
    for value, residual, v in zip(found.eigenvalues, found.residuals, found.vectors, strict=True):
        assert residual == pytest.approx(float((matrix @ flat(v) - value * flat(v)).norm()), abs=1e-12)
    gram = found.vectors.gram()
    assert torch.allclose(gram, torch.eye(3, dtype=torch.float64), atol=1e-12)


@pytest.mark.fast
def test_a_rank_below_k_and_too_few_iterations() -> None:
    a = of_matrix(symmetric([2.0, 0.0, 0.0, 0.0]))
    found = power_iteration(a.space, None, k=4, of=a)  # type: ignore[arg-type]
    assert found.eigenvalues == pytest.approx((2.0, 0.0, 0.0, 0.0), abs=1e-9) and found.converged
    a = of_matrix(symmetric(torch.linspace(0, 1, 50)))
    found = power_iteration(a.space, None, k=2, max_iterations=3, of=a)  # type: ignore[arg-type]
    assert not found.converged and found.products == 6
    with pytest.raises(UserError, match="k=51 must be between 1 and 50"):
        power_iteration(a.space, None, k=51, of=a)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="max_iterations=1 must be >= 2"):
        power_iteration(a.space, None, max_iterations=1, of=a)  # type: ignore[arg-type]
