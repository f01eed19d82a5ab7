"""Epsilon-sharpness: one over the distance along the gradient at which the loss has risen by epsilon.

    eta such that L(w + eta g) - L(w) = epsilon         value 1 / (eta |g|)

Keskar, Mudigere, Nocedal, Smelyanskiy, Tang 2017, "On Large-Batch Training for Deep Learning …", in the form that
Bisla, Wang, Choromanska 2022, "Low-Pass Filtering SGD …", coded: one gradient of the whole batch, eta_max from 1 by
factors of 5, then bisection of [1e-16, eta_max] until the rise is epsilon = 0.1 within 1e-6; `normalised` weights.
Differs from their code in: the bisection ends by the relative width of its bracket, not by an absolute one of 1e-6,
which ends too early where the gradient is long. A loss that is inf or NaN counts as risen.

Cost: one gradient and about 20 to 60 forwards; memory: two vectors; communication: a forward's.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite

from elastic_lsopt.errors import UserError
from elastic_lsopt.oracle.oracle import Oracle
from elastic_lsopt.probes.flatness.neighbourhood import Neighbourhood, refuse_not_positive
from elastic_lsopt.space.geometry import ParameterSpace
from elastic_lsopt.space.precision import full_precision

LOWEST, GROWTH, GROWTHS, NARROW = 1e-16, 5.0, 60, 1e-12
"""The bracket: its lower end, how its upper end grows and how often, and the share of eta at which it is a point."""


@dataclass(frozen=True)
class EpsilonSharpness:
    """`value` = 1 / `distance`; `rise` is what the bisection reached in place of epsilon."""

    value: float
    distance: float
    rise: float
    gradients: int
    forwards: int
    seconds: float


@full_precision()
def epsilon_sharpness(
    space: ParameterSpace,
    oracle: Oracle,
    *,
    epsilon: float = 0.1,
    tolerance: float = 1e-6,
    normalised: bool = False,
) -> EpsilonSharpness:
    """Bisection on the step along the gradient; `epsilon` and `tolerance` > 0 are in units of the loss (collective).

    Raises UserError for a setting out of range, where the gradient is 0, and where the loss never rises that far;
    NonFinite where loss or gradient at the weights are inf or NaN.
    """
    refuse_not_positive("epsilon", epsilon)
    refuse_not_positive("tolerance", tolerance)
    around = Neighbourhood(space, oracle, normalised)
    g = around.gradient()
    length = space.norm(g)
    if not length:
        raise UserError(
            "the gradient is 0, so epsilon-sharpness has no direction of ascent; move off the critical point."
        )

    def rise(eta: float) -> float:
        d = around.at(g, eta) - around.loss
        return d if isfinite(d) else float("inf")

    low, high = LOWEST, 1.0
    for _ in range(GROWTHS):
        d = rise(high)
        if d >= epsilon:
            break
        high *= GROWTH
    else:
        raise _never(epsilon)
    eta, reached = high, d
    while abs(reached - epsilon) > tolerance and high - low > NARROW * high:
        eta = (low + high) / 2
        reached = rise(eta)
        low, high = (eta, high) if reached < epsilon else (low, eta)
    if not isfinite(reached):
        reached = rise(low)
        eta = low
        if not abs(reached - epsilon) <= tolerance:
            raise _never(epsilon)
    return EpsilonSharpness(
        1 / (eta * length), eta * length, reached, around.gradients, around.forwards, around.seconds
    )  # fmt: skip


def _never(epsilon: float) -> UserError:
    return UserError(f"the loss along the gradient never rises by epsilon={epsilon}; use a smaller epsilon.")
