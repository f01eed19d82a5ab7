"""Lanczos against dense eigenvalues, other libraries, known spectra with copies and null spaces, itself on ranks."""

from __future__ import annotations

import copy
import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import elastic_lsopt as lso
from elastic_lsopt.errors import NonFinite, UserError
from elastic_lsopt.probes.spectrum.lanczos import lanczos
from elastic_lsopt.probes.spectrum.operator import Operator
from tests.cases import engines
from tests.cases.probes import spectra
from tests.cases.probes.spectra import flat, of_matrix, symmetric
from tests.oracles.paper_loops import cross_entropy


def run(matrix: torch.Tensor, **settings: Any) -> Any:
    a = of_matrix(matrix)
    return lanczos(a.space, None, of=a, **settings)  # type: ignore[arg-type]


@pytest.mark.fast
@pytest.mark.parametrize("which", ["largest", "smallest", "both"])
def test_dense_hessian(which: Any) -> None:
    space, oracle, h, _ = spectra.small()
    exact = torch.linalg.eigvalsh(h).flip(0)
    found = lanczos(space, oracle, k=4, which=which, tolerance=1e-9, vectors=True)
    wanted = {"largest": exact[:4], "smallest": exact[-4:], "both": torch.cat([exact[:4], exact[-4:]])}[which]
    assert torch.allclose(torch.tensor(found.eigenvalues, dtype=torch.float64), wanted, rtol=0, atol=1e-10)
    assert found.converged and max(found.relative_residuals) <= 1e-9 and found.relative_error is None
    for value, residual, v in zip(found.eigenvalues, found.residuals, found.vectors or [], strict=True):
        x = flat(v)
        assert abs(x.norm() - 1) < 1e-12
        assert abs(float((h @ x - value * x).norm()) - residual) < 1e-12


@pytest.mark.fast
def test_residuals_are_what_they_say_at_a_loose_tolerance() -> None:
    matrix = symmetric([10.0, 9.0, 8.0, *torch.linspace(-1, 3, 60).tolist()])
    found = run(matrix, k=3, tolerance=1e-3, vectors=True)
    assert found.converged and found.products < 30
    for value, residual, v in zip(found.eigenvalues, found.residuals, found.vectors, strict=True):
        true = float((matrix @ flat(v) - value * flat(v)).norm())
        assert residual == pytest.approx(true, abs=1e-12) and true <= 1e-2


@pytest.mark.fast
def test_residuals_see_products_that_are_not_symmetric() -> None:
    """Central differences are only nearly so: |beta s| alone would go to 0."""
    torch.manual_seed(3)
    matrix = symmetric([10.0, 9.0, 8.0, *torch.linspace(-1, 3, 60).tolist()]) + 1e-3 * torch.randn(63, 63).double()
    found = run(matrix, k=3, tolerance=1e-7, vectors=True)
    for value, residual, v in zip(found.eigenvalues, found.residuals, found.vectors, strict=True):
        assert residual == pytest.approx(float((matrix @ flat(v) - value * flat(v)).norm()), rel=1e-6)
    assert not found.converged or found.products == 63


@pytest.mark.fast
@pytest.mark.parametrize("which", ["largest", "smallest", "both"])
@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_restarts(which: Any, dtype: torch.dtype, tolerance: float) -> None:
    values = torch.cat([torch.linspace(-2, 2, 90), torch.tensor([3.0, 3.5, 4.0, -3.0, -3.5])]).double().sort().values
    matrix = symmetric(values, dtype=dtype)
    found = run(matrix, k=3, which=which, capacity=12, tolerance=tolerance, vectors=True)
    exact = values.flip(0)
    wanted = {"largest": exact[:3], "smallest": exact[-3:], "both": torch.cat([exact[:3], exact[-3:]])}[which]
    assert found.converged and found.products > 12
    assert torch.allclose(torch.tensor(found.eigenvalues, dtype=torch.float64), wanted, atol=10 * tolerance)
    for value, residual, v in zip(found.eigenvalues, found.residuals, found.vectors, strict=True):
        true = float((matrix @ flat(v) - value * flat(v)).norm())
        assert true <= 4 * tolerance + 1e-5 * (dtype == torch.float32)
        assert abs(true - residual) < (1e-5 if dtype == torch.float32 else 1e-12)


@pytest.mark.fast
@settings(max_examples=25, derandomize=True)
@given(
    copies=st.lists(st.tuples(st.sampled_from([-2.0, 0.0, 0.5, 1.0, 4.0]), st.integers(1, 5)), min_size=1, max_size=4),
    k=st.integers(1, 6),
    which=st.sampled_from(["largest", "smallest"]),
    seed=st.integers(0, 5),
)
def test_copies_and_null_spaces(copies: list[tuple[float, int]], k: int, which: Any, seed: int) -> None:
    """The Krylov space ends after as many steps as there are different eigenvalues; every copy is found."""
    values = sorted(value for value, count in copies for _ in range(count))
    k = min(k, len(values))
    found = run(symmetric(values, seed), k=k, which=which, tolerance=1e-7)
    wanted = values[::-1][:k] if which == "largest" else values[:k][::-1]
    assert found.eigenvalues == pytest.approx(wanted, abs=1e-9)
    assert found.converged and found.products <= len(values)


@pytest.mark.fast
def test_all_of_a_spectrum_gives_trace_and_frobenius() -> None:
    space, oracle, h, rows = spectra.small()
    mine = torch.tensor([name.startswith("2.") for name in rows])
    n = int(mine.sum())
    found = lanczos(space, oracle, k=n, parameters="2.*", tolerance=1e-9)
    block = h[mine][:, mine]
    assert sum(found.eigenvalues) == pytest.approx(float(block.trace()), rel=1e-10)
    assert sum(x * x for x in found.eigenvalues) == pytest.approx(float(block.square().sum()), rel=1e-10)
    assert found.products == n


def test_other_libraries_agree() -> None:
    hessian_eigenthings = pytest.importorskip("hessian_eigenthings")
    pyhessian = pytest.importorskip("pyhessian")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 12), nn.Tanh(), nn.Linear(12, 3))
    x, y = engines.batches(1, 1, size=32)[0][0]
    space, oracle = lso.attach(copy.deepcopy(model), cross_entropy, [(x, y)])
    ours = lanczos(space, oracle, k=5, tolerance=1e-4)

    operator = hessian_eigenthings.HessianOperator(
        model=copy.deepcopy(model), dataloader=[(x, y)], loss_fn=lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1])
    )
    theirs = hessian_eigenthings.lanczos(operator, k=5, max_iter=50, which="LA", seed=0)
    assert ours.eigenvalues == pytest.approx(sorted(theirs.eigenvalues.tolist())[::-1], rel=1e-3)

    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    other = pyhessian.hessian(copy.deepcopy(model), nn.functional.cross_entropy, data=(x, y), cuda=False)
    values, _ = other.eigenvalues(maxIter=500, tol=1e-6, top_n=1)
    assert ours.eigenvalues[0] == pytest.approx(values[0], rel=1e-3)


@pytest.mark.fast
def test_bad_settings() -> None:
    a = of_matrix(torch.eye(6, dtype=torch.float64))
    for settings_, says in (
        ({"k": 7}, "k=7 must be between 1 and 6, the size of the space"),
        ({"k": 4, "which": "both"}, "2 k=8 must be between 1 and 6"),
        ({"k": 0}, "k=0"),
        ({"k": 2, "capacity": 4}, "capacity=4 must be >= 5"),
        ({"k": 2, "max_products": 1}, "max_products=1 must be >= 2"),
        ({"which": "top", "k": 1}, "which='top' is unknown"),
        ({"k": 1, "tolerance": 0.0}, "tolerance=0.0 must be > 0"),
    ):
        with pytest.raises(UserError, match=says.replace("(", r"\(")):
            lanczos(a.space, None, of=a, **settings_)  # type: ignore[arg-type]


@pytest.mark.fast
def test_not_finite_and_nothing() -> None:
    with pytest.raises(NonFinite):
        run(torch.full((5, 5), float("nan"), dtype=torch.float64), k=1)
    nothing = run(torch.zeros(5, 5, dtype=torch.float64), k=2)
    assert nothing.eigenvalues == (0.0, 0.0) and nothing.converged and nothing.relative_residuals == (0.0, 0.0)


@pytest.mark.fast
def test_out_of_products() -> None:
    found = run(symmetric(torch.linspace(0, 1, 80)), k=3, max_products=5)
    assert not found.converged and found.products == 5 and max(found.relative_residuals) > 1e-3


def test_an_error_of_the_products_is_passed_on() -> None:
    space, oracle, h, _ = spectra.small()
    a = Operator(space, oracle.hvp)
    oracle.products.use_differences()
    found = lanczos(space, oracle, k=1, of=a)
    assert found.relative_error is not None and 0 < found.relative_error < 1e-4
    assert found.eigenvalues[0] == pytest.approx(float(torch.linalg.eigvalsh(h)[-1]), rel=1e-5)


@pytest.fixture(scope="module")
def alone(ranks: Any) -> dict[str, Any]:
    [found] = ranks(1).run("tests.cases.probes.spectra:probed", kind="fsdp2")
    return found


@pytest.mark.parametrize("kind,world", [("plain", 1), pytest.param("ddp", 2, marks=pytest.mark.full), ("hsdp", 2)])
def test_the_same_on_other_backends(ranks: Any, alone: dict[str, Any], kind: str, world: int) -> None:
    for r in ranks(world).run("tests.cases.probes.spectra:probed", kind=kind):
        assert r["products"] == alone["products"] and r["local"]
        for name, value in alone.items():
            assert r[name] == pytest.approx(value, rel=1e-8, abs=1e-9), name


@pytest.mark.parametrize(
    "kind", ["zero1", "zero3", *(pytest.param(kind, marks=pytest.mark.full) for kind in ("zero0", "zero2"))]
)
def test_the_same_under_zero(ranks: Any, alone: dict[str, Any], kind: str) -> None:
    """In fp32: what converged to a tolerance, and the same random vectors."""
    for r in ranks(2).run("tests.cases.probes.spectra:probed", kind=kind):
        assert r["local"] and r["same space"] == pytest.approx(3.0, abs=1e-3)
        assert r["lanczos"][:6] == pytest.approx(alone["lanczos"][:6], rel=1e-4)
        assert r["lobpcg"] == pytest.approx(alone["lobpcg"], rel=1e-3)
        for name in ("hutchpp", "xtrace", "frobenius", "diagonal"):
            assert r[name] == pytest.approx(alone[name], rel=1e-3), name


def test_the_same_at_every_world_size(ranks: Any, alone: dict[str, Any]) -> None:
    """All spectral probes: see the case."""
    assert alone["same space"] == pytest.approx(3.0, abs=1e-4) and alone["local"]
    assert alone["lanczos"][:3] == pytest.approx(alone["lobpcg"], rel=1e-6)
    for world in (2, 3):
        for r in ranks(world).run("tests.cases.probes.spectra:probed", kind="fsdp2"):
            assert r["products"] == alone["products"] and r["local"]
            for name, value in alone.items():
                assert r[name] == pytest.approx(value, rel=1e-8, abs=1e-9), name
