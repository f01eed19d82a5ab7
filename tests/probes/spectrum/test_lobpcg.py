"""LOBPCG against dense eigenvalues: both ends, both precisions, copies, blocks beyond a third of the space."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from elastic_lsopt.errors import NonFinite, UserError
from elastic_lsopt.probes.spectrum.lobpcg import lobpcg
from tests.cases.probes import spectra
from tests.cases.probes.spectra import flat, of_matrix, symmetric


@pytest.mark.fast
@pytest.mark.parametrize("which", ["largest", "smallest"])
@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_known_spectrum(which: Any, dtype: torch.dtype, tolerance: float) -> None:
    values = torch.tensor([6.0, 6.0, 5.0, 4.0, *torch.linspace(-2, 2, 80).tolist(), -3.0, -4.0, -4.0]).double()
    matrix = symmetric(values, dtype=dtype)
    a = of_matrix(matrix)
    found = lobpcg(a.space, None, k=3, which=which, tolerance=tolerance, vectors=True, of=a)  # type: ignore[arg-type]
    wanted = (6.0, 6.0, 5.0) if which == "largest" else (-3.0, -4.0, -4.0)
    assert found.eigenvalues == pytest.approx(wanted, abs=30 * tolerance) and found.converged
    assert found.vectors
    assert torch.allclose(found.vectors.gram(), torch.eye(3, dtype=torch.float64), atol=10 * tolerance)
    for value, residual, v in zip(found.eigenvalues, found.residuals, found.vectors, strict=True):
        true = float((matrix @ flat(v) - value * flat(v)).norm())
        assert true <= 10 * tolerance and abs(true - residual) < tolerance


def test_a_small_network() -> None:
    space, oracle, h, _ = spectra.small()
    found = lobpcg(space, oracle, k=4, tolerance=1e-6)
    assert found.eigenvalues == pytest.approx(torch.linalg.eigvalsh(h).flip(0)[:4].tolist(), abs=1e-9)


@pytest.mark.fast
@pytest.mark.parametrize("n,k", [(1, 1), (4, 4), (5, 2), (7, 3)])
@pytest.mark.parametrize("which", ["largest", "smallest"])
def test_blocks_beyond_a_third_of_the_space(n: int, k: int, which: Any) -> None:
    values = sorted((float(i % 3) for i in range(n)), reverse=True)
    a = of_matrix(symmetric(values))
    found = lobpcg(a.space, None, k=k, which=which, tolerance=1e-9, of=a)  # type: ignore[arg-type]
    assert found.eigenvalues == pytest.approx(values[:k] if which == "largest" else values[-k:], abs=1e-10)
    assert found.converged


@pytest.mark.fast
def test_bad_settings() -> None:
    a = of_matrix(torch.eye(4, dtype=torch.float64))
    for settings, says in (
        ({"k": 5}, "k=5 must be between 1 and 4"),
        ({"k": 1, "which": "top"}, "which='top' is unknown"),
        ({"k": 1, "guard": -1}, "guard=-1 >= 0"),
    ):
        with pytest.raises(UserError, match=says):
            lobpcg(a.space, None, of=a, **settings)  # type: ignore[arg-type]
    a = of_matrix(torch.full((4, 4), float("inf"), dtype=torch.float64))
    with pytest.raises(NonFinite):
        lobpcg(a.space, None, k=1, of=a)  # type: ignore[arg-type]


@pytest.mark.fast
def test_the_last_step_makes_it_fast() -> None:
    """Steepest descent, without P, takes about 700 products here."""
    a = of_matrix(symmetric(torch.linspace(0, 1, 200) ** 2))
    found = lobpcg(a.space, None, k=2, tolerance=1e-6, max_iterations=400, of=a)  # type: ignore[arg-type]
    assert found.converged and found.products < 250
