"""The Fisher-Rao norm of the weights: their length as the curvature sees it.

    w' H w

Liang, Poggio, Rakhlin, Stokes 2019, "Fisher-Rao Metric, Geometry, and Complexity of Neural Networks", with the Hessian
in place of the Fisher matrix as in Bisla, Wang, Choromanska 2022, "Low-Pass Filtering SGD …", code `fim`. It is the
same in the coordinates of `filter_norms`, so there is nothing to normalise. `of="ggn"` gives the paper's own matrix
for a loss that is a likelihood of its logits.

Cost: one product; memory: one vector; one all-reduce beside the product's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Unpack

from elastic_lsopt.oracle.oracle import Oracle
from elastic_lsopt.probes.spectrum.operator import On, operator
from elastic_lsopt.space.geometry import ParameterSpace
from elastic_lsopt.space.precision import full_precision


@dataclass(frozen=True)
class FisherRao:
    """`relative_error` is that of the product (None: exact)."""

    value: float
    relative_error: float | None
    products: int
    seconds: float


@full_precision()
def fisher_rao(
    space: ParameterSpace,
    oracle: Oracle,
    **on: Unpack[On],
) -> FisherRao:
    """The quadratic form of the weights (collective); with `parameters`, of those and their block.

    Raises NonFinite where the curvature is inf or NaN.
    """
    a = operator(space, oracle, **on)
    w = a.project_(space.weights.clone())
    return FisherRao(a.dot(w, a(w)), a.relative_error, a.products, a.seconds)
