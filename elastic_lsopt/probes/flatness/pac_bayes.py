"""The PAC-Bayes measure: the noise that the weights bear, set against their distance from where they began.

    sigma such that (1/m) sum_i L(w + sigma z_i) - L(w) = rise          z_i ~ N(0, I)
    value |w - w0|^2 / (4 sigma^2) + log(2 n / delta)                   n training samples, delta = 1e-6

Jiang, Neyshabur, Mobahi, Krishnan, Bengio 2020, "Fantastic Generalization Measures …", in the form that Bisla, Wang,
Choromanska 2022, "Low-Pass Filtering SGD …", coded: rise 0.1 within 1e-6, 10 draws, bisection from 0.001 in
[0, 100], `normalised` weights.
Differs from their code in: 1. all sigmas see the same draws, so what is bisected is a function, and the answer carries
a standard error (they draw anew at every sigma); 2. the bracket ends by its relative width; 3. `initial` is used
(their code, as published, sets w0 = 0 whatever it is given).

Cost: 1 + 10 draws x about 30 bisections forwards; memory: one shard while perturbed (two vectors more where
`normalised`); communication: a forward's.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite, log, nan, sqrt
from statistics import fmean, stdev

from elastic_lsopt.errors import UserError
from elastic_lsopt.oracle.oracle import Oracle
from elastic_lsopt.probes.flatness.filter_norms import filter_norms
from elastic_lsopt.probes.flatness.neighbourhood import Neighbourhood, refuse_below_one, refuse_not_positive
from elastic_lsopt.space.geometry import ParameterSpace
from elastic_lsopt.space.precision import full_precision
from elastic_lsopt.space.vector import Vector

FIRST, HIGHEST, NARROW = 1e-3, 100.0, 1e-12
DELTA = 1e-6
"""The probability with which the bound may fail."""


@dataclass(frozen=True)
class PACBayes:
    """`rise` is what the bisection reached; `standard_error` is the value's, by the spread of the draws (nan: one)."""

    value: float
    standard_error: float
    sigma: float
    square_distance: float
    rise: float
    forwards: int
    seconds: float


@full_precision()
def pac_bayes(
    space: ParameterSpace,
    oracle: Oracle,
    *,
    initial: Vector,
    samples: int | None = None,
    rise: float = 0.1,
    draws: int = 10,
    tolerance: float = 1e-6,
    normalised: bool = False,
) -> PACBayes:
    """Bisection on sigma; `rise` and `tolerance` > 0 are in units of the loss, `draws` >= 1 (collective).

    `initial` are the weights at the start (`space.zeros()`: the origin), `samples` >= 1 the size of the training set
    (None: the oracle's batch). Raises UserError for a setting out of range and where noise of 100 does not raise the
    loss that far, NonFinite where the loss at the weights is inf or NaN.
    """
    refuse_not_positive("rise", rise)
    refuse_not_positive("tolerance", tolerance)
    refuse_below_one("draws", draws)
    n = getattr(oracle, "samples", None) if samples is None else samples
    if n is None:
        raise UserError(
            "samples is missing and this oracle does not count its batch; give the size of the training set."
        )
    refuse_below_one("samples", n)
    around = Neighbourhood(space, oracle, normalised)
    square = _square_distance(space, around, initial)

    def rises(sigma: float) -> list[float]:
        each = [around.noisy(i, sigma) - around.loss for i in range(draws)]
        return [d if isfinite(d) else float("inf") for d in each]

    low, high, sigma = 0.0, HIGHEST, FIRST
    each = rises(sigma)
    reached = fmean(each)
    while abs(reached - rise) > tolerance and high - low > NARROW * high:
        low, high = (sigma, high) if reached < rise else (low, sigma)
        sigma = (low + high) / 2
        each = rises(sigma)
        reached = fmean(each)
    if not isfinite(reached) or (high == HIGHEST and reached < rise - tolerance):
        raise UserError(f"noise of up to sigma={HIGHEST:g} never raises the loss by rise={rise}; use a smaller rise.")
    first = square / (4 * sigma**2)
    # The rise grows as sigma^2 and the term falls as it: their relative errors are the same.
    error = first * stdev(each) / sqrt(draws) / abs(reached) if draws > 1 and reached else nan
    return PACBayes(
        first + log(2 * n / DELTA), error, sigma, square, reached, around.forwards, around.seconds
    )  # fmt: skip


def _square_distance(space: ParameterSpace, around: Neighbourhood, initial: Vector) -> float:
    """|w' - w0'|^2, each in its own coordinates where normalised, as in the authors' code."""
    w = _divided(space.weights, around.norms)
    w.add_(_divided(initial, None if around.norms is None else filter_norms(space, initial)), alpha=-1.0)
    return space.norm(w) ** 2


def _divided(v: Vector, norms: Vector | None) -> Vector:
    out = v.clone()
    if norms is not None:
        for t, p in zip(out.tensors, norms.tensors, strict=True):
            t.div_(p)
    return out
