"""The trace of a symmetric matrix by random signs.

    tr A ~ (1/m) sum_i z_i' A z_i      z_ij = +1 or -1

Unbiased, with variance 2 (|A|_F^2 - sum_i A_ii^2) / m: halving the error takes four times the products.

Hutchinson 1989, "A stochastic estimator of the trace of the influence matrix for Laplacian smoothing splines".
Cost: `samples` products; memory: one vector; one all-reduce a product.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from statistics import fmean, stdev
from typing import Unpack

from elastic_lsopt.oracle.oracle import Oracle
from elastic_lsopt.probes.spectrum.operator import On, operator
from elastic_lsopt.space.geometry import ParameterSpace
from elastic_lsopt.space.precision import full_precision


@dataclass(frozen=True)
class Trace:
    """An estimated trace and its standard error (nan: one sample tells nothing of it)."""

    value: float
    standard_error: float
    products: int
    seconds: float


@full_precision()
def hutchinson(
    space: ParameterSpace,
    oracle: Oracle,
    *,
    samples: int = 100,
    **on: Unpack[On],
) -> Trace:
    """The trace, by the mean of `samples` >= 1 quadratic forms (collective).

    Raises UserError for samples < 1, NonFinite where the curvature is inf or NaN.
    """
    a = operator(space, oracle, **on)
    a.refuse_fewer_than_one("samples", samples)
    forms = []
    for i in range(samples):
        z = a.signs(i)
        forms.append(a.dot(z, a(z)))
    error = stdev(forms) / sqrt(samples) if samples > 1 else float("nan")
    return Trace(fmean(forms), error, a.products, a.seconds)
