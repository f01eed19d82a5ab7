"""The eigenvalues of largest magnitude, one after the other, by power iteration with deflation.

    v <- v - sum_j <v, x_j> x_j,  v <- v / |v|,  lambda = v' A v,  v <- A v      until |change of lambda| < tol |lambda|

As in PyHessian (Yao, Gholami, Keutzer, Mahoney 2020, "PyHessian: Neural networks through the lens of the Hessian"), but
the vector returned is the one whose quotient is returned, with its residual. Convergence goes with |lambda_2 /
lambda_1|; a small change of lambda does not mean a small residual: `lanczos` needs a fraction of the products.
Cost: up to k `max_iterations` products; memory: k + 2 vectors; four all-reduces a product.
"""

from __future__ import annotations

from typing import Unpack

import torch

from elastic_lsopt.errors import UserError
from elastic_lsopt.oracle.oracle import Oracle
from elastic_lsopt.probes.spectrum.eigenpairs import Eigenpairs
from elastic_lsopt.probes.spectrum.operator import On, Operator, operator
from elastic_lsopt.space.basis import Basis
from elastic_lsopt.space.geometry import ParameterSpace
from elastic_lsopt.space.precision import full_precision
from elastic_lsopt.space.vector import Vector


@full_precision()
def power_iteration(
    space: ParameterSpace,
    oracle: Oracle,
    *,
    k: int = 1,
    tolerance: float = 1e-3,
    max_iterations: int = 100,
    vectors: bool = False,
    basis_device: torch.device | str | None = None,
    **on: Unpack[On],
) -> Eigenpairs:
    """The k eigenvalues of largest magnitude, in the order found: of either sign (collective).

    `tolerance` > 0 is the relative change of an eigenvalue between two products, `max_iterations` >= 2 those of one
    eigenvalue. Raises UserError for k beyond the space, NonFinite where the curvature is inf or NaN.
    """
    a = operator(space, oracle, **on)
    a.refuse_more_than_there_is("k", k)
    if max_iterations < 2 or not tolerance > 0:
        raise UserError(f"max_iterations={max_iterations} must be >= 2 and tolerance={tolerance} > 0.")
    found = Basis(space, k, basis_device)
    values: list[float] = []
    residuals: list[float] = []
    converged, largest, rounding = True, 0.0, 10 * torch.finfo(space.dtype).eps
    for i in range(k):
        value, done = float("nan"), False
        v = image = a.direction(i)
        for _ in range(max_iterations):
            found.orthogonalise_(image)
            length = space.norm(image)
            v = image.mul_(1 / length) if length > 0 else _orthogonal(a, found, k + i)
            image = a(v)
            before, value = value, a.dot(v, image)
            largest = max(largest, abs(value))
            done = abs(value - before) <= tolerance * abs(value) + rounding * largest
            if done:
                break
        residuals.append(space.norm(image.add_(v, alpha=-value)))
        values.append(value)
        found.append(v)
        converged &= done
    return Eigenpairs(
        tuple(values),
        tuple(residuals),
        found if vectors else None,
        converged,
        a.products,
        a.seconds,
        a.relative_error,
    )


def _orthogonal(a: Operator, found: Basis, draw: int) -> Vector:
    """A random direction orthogonal to what was found: v lay in the null space."""
    v = a.direction(draw)
    found.orthogonalise_(v)
    return v.mul_(1 / a.space.norm(v))
