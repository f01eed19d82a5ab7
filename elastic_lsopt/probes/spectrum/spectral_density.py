"""How many eigenvalues a symmetric matrix has where, by stochastic Lanczos quadrature.

    phi(t) = (1/n) sum_i delta(t - lambda_i) ~ mean over v of sum_i w_vi delta(t - theta_vi)
    T_v = S diag(theta_v) S' of `steps` Lanczos steps from v,  w_vi = s_1i^2;  v random signs / sqrt(n)

Each vector's quadrature is exact for polynomials of degree 2 steps - 1, so its moments are v' A^p v, unbiased for
tr A^p / n. With full re-orthogonalisation: no copies of converged eigenvalues.

Ubaru, Chen, Saad 2017, "Fast estimation of tr(f(A)) via stochastic Lanczos quadrature"; Ghorbani, Krishnan, Xiao 2019,
"An investigation into neural net optimization via Hessian eigenvalue density" (who draw Gaussians). Cost: vectors x
steps products; memory: steps + 4 vectors; three all-reduces a product.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import pi, sqrt
from typing import Unpack

import torch
from torch import Tensor

from elastic_lsopt.errors import UserError
from elastic_lsopt.oracle.oracle import Oracle
from elastic_lsopt.probes.spectrum.krylov import Krylov
from elastic_lsopt.probes.spectrum.operator import On, operator
from elastic_lsopt.space.basis import Basis
from elastic_lsopt.space.geometry import ParameterSpace
from elastic_lsopt.space.precision import full_precision


@dataclass(frozen=True)
class SpectralDensity:
    """Of each random vector its nodes (ascending) and weights (summing to 1); fewer than `steps` where all was found.

    Whatever is asked of it comes with its standard error over the vectors (nan: there is one).
    """

    nodes: tuple[tuple[float, ...], ...]
    weights: tuple[tuple[float, ...], ...]
    dimension: int
    products: int
    seconds: float
    relative_error: float | None

    def density(self, grid: Tensor, width: float) -> tuple[Tensor, Tensor]:
        """phi on the grid, each node a Gaussian of standard deviation `width` > 0, and its standard error; fp64."""
        if not width > 0:
            raise UserError(f"width={width} must be > 0.")
        at = grid.to(torch.float64)[:, None]
        return self._mean(lambda t: torch.exp(-0.5 * ((at - t) / width) ** 2) / (width * sqrt(2 * pi)))

    def moment(self, p: int) -> tuple[float, float]:
        """tr A^p / n and its standard error."""
        mean, error = self._mean(lambda t: t**p)
        return float(mean), float(error)

    @property
    def trace(self) -> tuple[float, float]:
        """n times the first moment, and its standard error."""
        mean, error = self.moment(1)
        return self.dimension * mean, self.dimension * error

    @property
    def negative(self) -> tuple[float, float]:
        """The share of eigenvalues below 0, and its standard error."""
        mean, error = self._mean(lambda t: (t < 0).to(torch.float64))
        return float(mean), float(error)

    def _mean(self, f: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        each = []
        for nodes, weights in zip(self.nodes, self.weights, strict=True):
            t, w = torch.tensor(nodes, dtype=torch.float64), torch.tensor(weights, dtype=torch.float64)
            each.append((f(t) * w).sum(-1))
        values = torch.stack(each)
        if len(each) == 1:
            return values[0], torch.full_like(values[0], torch.nan)
        return values.mean(0), values.std(0) / sqrt(len(each))


@full_precision()
def spectral_density(
    space: ParameterSpace,
    oracle: Oracle,
    *,
    vectors: int = 10,
    steps: int = 80,
    basis_device: torch.device | str | None = None,
    **on: Unpack[On],
) -> SpectralDensity:
    """Quadratures from `vectors` >= 1 random starts of 1 <= `steps` <= dimension (collective).

    `parameters` restricts it to those whose names match: a layer, a block. `basis_device` "cpu" keeps the Lanczos
    vectors in host memory. Raises UserError for settings out of range, NonFinite where the curvature is inf or NaN.
    """
    a = operator(space, oracle, **on)
    a.refuse_fewer_than_one("vectors", vectors)
    a.refuse_more_than_there_is("steps", steps)
    rows = Basis(space, steps, basis_device)
    nodes, weights = [], []
    for i in range(vectors):
        krylov = Krylov(a, a.signs(i), steps, rows=rows)
        while len(krylov) < steps and not krylov.invariant:
            krylov.step()
        ritz = krylov.ritz()
        nodes.append(tuple(ritz.values.tolist()))
        weights.append(tuple(ritz.columns[0].square().tolist()))
    return SpectralDensity(tuple(nodes), tuple(weights), a.dimension, a.products, a.seconds, a.relative_error)
