"""The norm of the gradient as a measure of flatness, as GRAWA takes it.

    |g|                   global L2 norm
    sum_l |g_l|           sum over parameter tensors: MGRAWA's number, not the global norm; |g_l| alone is LGRAWA's

Dimlioglu, Choromanska 2024, "GRAWA: Gradient-based Weighted Averaging for Distributed Training of Deep Learning
Models". Differs from their code in: the gradient is of the mean loss; theirs is of the sum over the batch, which is
`samples` times as long.

Cost: one gradient; no memory; one all-reduce of a number a parameter.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from elastic_lsopt.oracle.oracle import Oracle
from elastic_lsopt.space.geometry import ParameterSpace
from elastic_lsopt.space.precision import full_precision


@dataclass(frozen=True)
class GradientNorm:
    """`value` is the global norm, `sum_of_norms` the sum of `norms`, one a parameter by name."""

    value: float
    sum_of_norms: float
    norms: dict[str, float]
    loss: float
    gradients: int
    seconds: float


@full_precision()
def gradient_norm(space: ParameterSpace, oracle: Oracle) -> GradientNorm:
    """The norms of the gradient at the present weights (collective). Raises NonFinite where it is inf or NaN."""
    began = time.monotonic()
    g = oracle.gradient()
    each = space.norm_per_parameter(g).values.tolist()
    norms = {p.name: x for p, x in zip(space.layout.parameters, each, strict=True)}
    return GradientNorm(space.norm(g), sum(each), norms, oracle.losses[-1], 1, time.monotonic() - began)
