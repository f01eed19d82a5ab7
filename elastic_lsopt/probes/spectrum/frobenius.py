"""The Frobenius norm of a symmetric matrix, from the lengths of its products with random vectors.

    |A|_F^2 = E |A z|^2 ~ (1/m) sum_i |A z_i|^2          E z z' = 1

The square is unbiased, with variance 2 (|A^2|_F^2 - sum_i (A^2)_ii^2) / m for signs and 2 |A^2|_F^2 / m for Gaussians,
which the LPF paper draws (Bisla, Wang, Choromanska 2022, "Low-pass filtering SGD for recovering flat optima").

Hutchinson's estimator of tr A^2, with one product where A (A z) would take two. Cost: `samples` products; memory: two
vectors; one all-reduce a product.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from statistics import fmean, stdev
from typing import Literal, Unpack

from elastic_lsopt.errors import UserError
from elastic_lsopt.oracle.oracle import Oracle
from elastic_lsopt.probes.spectrum.operator import On, operator
from elastic_lsopt.space.geometry import ParameterSpace
from elastic_lsopt.space.precision import full_precision


@dataclass(frozen=True)
class FrobeniusNorm:
    """An estimated norm, its square, and the standard error of each (nan: one sample tells nothing of it)."""

    value: float
    standard_error: float
    square: float
    square_standard_error: float
    products: int
    seconds: float
    relative_error: float | None


@full_precision()
def frobenius(
    space: ParameterSpace,
    oracle: Oracle,
    *,
    samples: int = 10,
    draw: Literal["signs", "gaussian"] = "signs",
    **on: Unpack[On],
) -> FrobeniusNorm:
    """|A|_F by the mean of `samples` >= 1 squares (collective).

    Raises UserError for settings out of range, NonFinite where the curvature is inf or NaN.
    """
    a = operator(space, oracle, **on)
    a.refuse_fewer_than_one("samples", samples)
    if draw not in ("signs", "gaussian"):
        raise UserError(f"draw={draw!r} is unknown; use signs or gaussian.")
    squares = []
    for i in range(samples):
        image = a(a.signs(i) if draw == "signs" else a.gaussian(i))
        squares.append(a.dot(image, image))
    square = fmean(squares)
    error = stdev(squares) / sqrt(samples) if samples > 1 else float("nan")
    value = sqrt(square)
    return FrobeniusNorm(
        value, error / (2 * value) if value else 0.0, square, error, a.products, a.seconds, a.relative_error
    )
