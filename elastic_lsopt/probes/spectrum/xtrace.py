"""The trace with every product used twice, for the sketch and for the estimate, leaving one vector out in turn: XTrace.

    Y = A W = Q R,   Q_i Q_i' = Q (1 - s_i s_i') Q',   s_i ~ R^-T e_i              the sketch without w_i
    t_i = tr(Q_i' A Q_i) + c_i w_i' (1 - Q_i Q_i') A (1 - Q_i Q_i') w_i,           tr A ~ mean t_i
    c_i = (n - m + 1) / |(1 - Q_i Q_i') w_i|^2: as if w_i were uniform on the sphere of what is left

Unbiased; exact where the rank is below m. R is m x m from any orthonormal basis Q: it need not be triangular. Where Y
depends on itself Q spans Y without any one of its columns, and s_i = 0. Unlike the paper's code nothing is kept of W,
which is drawn again, and w_i' A w_i = w_i' Q R e_i.

Epperly, Tropp, Webber 2024, "XTrace: Making the most of every sample in stochastic trace estimation". Cost: 2 m
products; memory: m + 3 vectors; one all-reduce of m numbers a product, two of m^2.
"""

from __future__ import annotations

from math import sqrt
from typing import Unpack

import torch

from elastic_lsopt.oracle.oracle import Oracle
from elastic_lsopt.probes.spectrum.hutchinson import Trace
from elastic_lsopt.probes.spectrum.operator import On, operator
from elastic_lsopt.probes.spectrum.orthonormal import whitening
from elastic_lsopt.space.basis import Basis
from elastic_lsopt.space.geometry import ParameterSpace
from elastic_lsopt.space.precision import full_precision


@full_precision()
def xtrace(
    space: ParameterSpace,
    oracle: Oracle,
    *,
    samples: int = 50,
    basis_device: torch.device | str | None = None,
    **on: Unpack[On],
) -> Trace:
    """The trace from `samples` >= 1 vectors, two products each (collective).

    Raises UserError for more samples than the space has dimensions, NonFinite where the curvature is inf or NaN.
    """
    a = operator(space, oracle, **on)
    a.refuse_more_than_there_is("samples", samples)
    q = Basis(space, samples, basis_device)
    for i in range(samples):
        z = a.gaussian(i)
        image = a(z)
        a.dot(z, image)  # refuses what is not finite
        q.append(image)
    r = torch.eye(samples, dtype=torch.float64)
    for _ in range(2):
        gram = q.gram()
        white = whitening(gram, space.dtype)
        r = white @ gram @ r
        q.combine_all_(white)
        if not len(q):
            return Trace(0.0, 0.0, a.products, a.seconds)  # A W = 0 for a random W: A = 0
    rank = len(q)
    w = torch.zeros(rank, samples, dtype=torch.float64)
    squares = torch.zeros(samples, dtype=torch.float64)
    for i in range(samples):
        z = a.gaussian(i)
        w[:, i] = q.coefficients(z)
        squares[i] = a.dot(z, z)
    h = torch.zeros(rank, rank, dtype=torch.float64)
    for j in range(rank):
        h[:, j] = q.coefficients(a(q[j]))
    h = (h + h.T) / 2
    s = torch.zeros(rank, samples, dtype=torch.float64)
    if rank == samples:
        s = torch.linalg.inv(r).T
        s = s / torch.linalg.vector_norm(s, dim=0)
    u = w - s * (s * w).sum(0)
    left = a.dimension - (rank - 1 if rank == samples else rank)
    form = (w * r).sum(0) - 2 * (u * r).sum(0) + (u * (h @ u)).sum(0)
    length2 = squares - u.square().sum(0)
    each = h.trace() - (s * (h @ s)).sum(0)
    if left > 0:
        each = each + left * form / length2
    error = float(each.std()) / sqrt(samples) if samples > 1 else float("nan")
    return Trace(float(each.mean()), error, a.products, a.seconds)
