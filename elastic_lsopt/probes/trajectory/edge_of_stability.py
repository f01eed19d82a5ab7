"""The edge of stability: how near the largest curvature is to what the step size can bear.

    SGD, momentum beta    lambda_max(H) against 2 (1 + beta) / eta                      2 / eta without momentum
    Adam                  lambda_max(D^-1/2 H D^-1/2) against 2 (1 + beta1) / ((1 - beta1) eta)      38 / eta at 0.9
                          D = (1 - beta1^t) (sqrt(v / (1 - beta2^t)) + eps), v Adam's second moment after t steps

A ratio above 1: on the quadratic at these weights, full-batch steps diverge. Training hovers about 1.

Cohen, Kaur, Li, Kolter, Talwalkar 2021, "Gradient Descent on Neural Networks Typically Occurs at the Edge of
Stability", equations 1 and 2; Cohen and others 2022, "Adaptive Gradient Methods at the Edge of Stability". Momentum is
torch's (eta outside; without Nesterov, dampening 0). Weight decay of the loss adds to lambda_max and is not counted.

Cost: some tens of products, and memory and communication as in `lanczos.py`; Adam: three vectors more.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from typing import Unpack

import torch

from elastic_lsopt.errors import NonFinite, UserError
from elastic_lsopt.oracle.oracle import Oracle
from elastic_lsopt.probes.flatness.neighbourhood import refuse_below_one, refuse_not_positive
from elastic_lsopt.probes.spectrum.lanczos import lanczos
from elastic_lsopt.probes.spectrum.operator import On, Operator, operator
from elastic_lsopt.space.geometry import ParameterSpace
from elastic_lsopt.space.precision import full_precision
from elastic_lsopt.space.vector import Vector


@dataclass(frozen=True)
class EdgeOfStability:
    """`value` = `largest` / `threshold`, both in units of the (preconditioned) curvature; `residual` is Lanczos's."""

    value: float
    largest: float
    threshold: float
    residual: float
    products: int
    seconds: float


@full_precision()
def edge_of_stability(
    space: ParameterSpace,
    oracle: Oracle,
    *,
    learning_rate: float,
    momentum: float = 0.0,
    **on: Unpack[On],
) -> EdgeOfStability:
    """The ratio for SGD with `learning_rate` > 0 and 0 <= `momentum` < 1 (collective).

    Raises UserError for a setting out of range, NonFinite where the curvature is inf or NaN.
    """
    refuse_not_positive("learning_rate", learning_rate)
    _refuse_no_share("momentum", momentum)
    return _ratio(space, oracle, operator(space, oracle, **on), 2 * (1 + momentum) / learning_rate)


@full_precision()
def adam_edge_of_stability(
    space: ParameterSpace,
    oracle: Oracle,
    *,
    learning_rate: float,
    steps: int,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    **on: Unpack[On],
) -> EdgeOfStability:
    """The ratio for Adam and AdamW after `steps` >= 1 of theirs, by the base optimizer's own `exp_avg_sq` (collective).

    Raises UserError for a setting out of range and where the base optimizer keeps no second moment (yet), NonFinite
    where the curvature is inf or NaN.
    """
    refuse_not_positive("learning_rate", learning_rate)
    _refuse_no_share("beta1", betas[0])
    a = preconditioned(space, oracle, steps=steps, betas=betas, eps=eps, **on)
    return _ratio(space, oracle, a, 2 * (1 + betas[0]) / ((1 - betas[0]) * learning_rate))


def preconditioned(
    space: ParameterSpace,
    oracle: Oracle,
    *,
    steps: int,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    **on: Unpack[On],
) -> Operator:
    """D^-1/2 H D^-1/2, with the eigenvalues of Adam's D^-1 H; memory: one vector, a product one more (collective)."""
    refuse_below_one("steps", steps)
    refuse_not_positive("eps", eps)
    for name, beta in zip(("beta1", "beta2"), betas, strict=True):
        _refuse_no_share(name, beta)
    d = _second_moment(space)
    for t in d.tensors:
        t.div_(1 - betas[1] ** steps).sqrt_().add_(eps).mul_(1 - betas[0] ** steps).rsqrt_()
    if not isfinite(space.norm(d)):
        raise NonFinite("Adam's second moment holds a number that is negative, inf or NaN.")
    a = operator(space, oracle, **on)
    product = a.apply
    return Operator(space, lambda v: product(v * d).mul_(d), a.parameters)


def _second_moment(space: ParameterSpace) -> Vector:
    """A copy of `exp_avg_sq`. A rank without a piece would not miss it, so all ranks are asked."""
    try:
        v, missing = space.base_state("exp_avg_sq").clone(), 0.0
    except KeyError:
        v, missing = space.zeros(), 1.0
    space.check_generation()
    lacking = space.shards.sum_pieces_(torch.tensor([missing], dtype=torch.float64, device=space.shards.device))
    if lacking.item():
        raise UserError(
            "the base optimizer keeps no exp_avg_sq: use Adam or AdamW and take a step first, or ask for SGD's ratio."
        )
    return v


def _ratio(space: ParameterSpace, oracle: Oracle, a: Operator, threshold: float) -> EdgeOfStability:
    top = lanczos(space, oracle, k=1, of=a)
    largest = top.eigenvalues[0]
    return EdgeOfStability(largest / threshold, largest, threshold, top.residuals[0], top.products, top.seconds)


def _refuse_no_share(name: str, value: float) -> None:
    if not 0 <= value < 1:
        raise UserError(f"{name}={value} must be >= 0 and < 1.")
