"""The diagonal of a symmetric matrix by random signs.

    A_ii ~ (1/m) sum_j z_ji (A z_j)_i            z_ji = +1 or -1

Unbiased; element i has variance (1/m) sum_{j != i} A_ij^2, which is estimated from the spread of the samples.

Bekas, Kokiopoulou, Saad 2007, "An estimator for the diagonal of a matrix" (with signs its denominator, sum z^2, is m).
Cost: `samples` products; memory: four vectors; one all-reduce a product.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import Unpack

from elastic_lsopt.oracle.oracle import Oracle
from elastic_lsopt.probes.spectrum.operator import On, operator
from elastic_lsopt.space.geometry import ParameterSpace
from elastic_lsopt.space.precision import full_precision
from elastic_lsopt.space.vector import Vector


@dataclass(frozen=True)
class Diagonal:
    """The estimated diagonal, and the expected length of its error, as such and as a share of its own length.

    nan: one sample tells nothing of it. `relative_error` is that of the products (None: exact to rounding).
    """

    values: Vector
    standard_error: float
    relative_standard_error: float
    products: int
    seconds: float
    relative_error: float | None


@full_precision()
def diagonal(
    space: ParameterSpace,
    oracle: Oracle,
    *,
    samples: int = 100,
    **on: Unpack[On],
) -> Diagonal:
    """The diagonal, by the mean of `samples` >= 1 element-wise products (collective).

    Raises UserError for samples < 1, NonFinite where the curvature is inf or NaN.
    """
    a = operator(space, oracle, **on)
    a.refuse_fewer_than_one("samples", samples)
    mean, spread = space.zeros(), 0.0
    for i in range(samples):
        z = a.signs(i)
        away = a(z).mul_(z).add_(mean, alpha=-1.0)
        # Welford: of each element's squares only the sum over all elements is wanted, so no vector keeps them.
        spread += a.dot(away, away) * i / (i + 1)
        mean.add_(away, alpha=1 / (i + 1))
    error = sqrt(spread / (samples - 1) / samples) if samples > 1 else float("nan")
    length = space.norm(mean)
    return Diagonal(mean, error, error / length if length else 0.0, a.products, a.seconds, a.relative_error)
