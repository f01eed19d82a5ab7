"""The trace by a low-rank sketch and Hutchinson's estimator on what is left: Hutch++.

    Q = orth(A S),   tr A ~ tr(Q' A Q) + (1/m) sum_i g_i' (1 - Q Q') A (1 - Q Q') g_i       S, g: signs, m = products/3

Unbiased; exact where the rank is at most m. Error eps tr A takes O(1/eps) products for a positive semi-definite matrix,
where Hutchinson's takes O(1/eps^2).

Meyer, Musco, Musco, Woodruff 2021, "Hutch++: Optimal stochastic trace estimation". Cost: 3 m products; memory: m + 3
vectors; one all-reduce of m numbers a product, two of m^2.
"""

from __future__ import annotations

from math import sqrt
from statistics import fmean, stdev
from typing import Unpack

import torch

from elastic_lsopt.oracle.oracle import Oracle
from elastic_lsopt.probes.spectrum.hutchinson import Trace
from elastic_lsopt.probes.spectrum.operator import On, operator
from elastic_lsopt.probes.spectrum.orthonormal import orthonormalise_
from elastic_lsopt.space.basis import Basis
from elastic_lsopt.space.geometry import ParameterSpace
from elastic_lsopt.space.precision import full_precision


@full_precision()
def hutchpp(
    space: ParameterSpace,
    oracle: Oracle,
    *,
    samples: int = 33,
    basis_device: torch.device | str | None = None,
    **on: Unpack[On],
) -> Trace:
    """The trace from `samples` >= 1 vectors in each of the three parts; the standard error is the last part's.

    Collective. Raises UserError for more samples than the space has dimensions, NonFinite for inf and NaN.
    """
    a = operator(space, oracle, **on)
    a.refuse_more_than_there_is("samples", samples)
    q = Basis(space, samples, basis_device)
    for i in range(samples):
        z = a.signs(i)
        image = a(z)
        a.dot(z, image)  # refuses what is not finite
        q.append(image)
    orthonormalise_(q)
    sketched = sum(a.dot(v, a(v)) for v in q)
    rest = []
    for i in range(samples, 2 * samples):
        z = a.signs(i)
        if len(q):
            q.orthogonalise_(z)
        rest.append(a.dot(z, a(z)))
    error = stdev(rest) / sqrt(samples) if samples > 1 else float("nan")
    return Trace(sketched + fmean(rest), error, a.products, a.seconds)
