"""Local entropy, and the length of its gradient: how much of the neighbourhood has a low loss.

    local entropy     -( log (1/m) sum_i exp(-L(w + z_i / gamma)) + n/2 log 2 pi - 1/2 log gamma )      z_i ~ N(0, I)
    its gradient      mu_LE = |w - <w'>|,  from w' = w, `steps` times
                      w'   <- w' - eta' (grad L(w') + g0 (w' - w) + eps / sqrt(eta' / 2) z),   eta' = 0.1
                      <w'> <- 0.75 <w'> + 0.25 w'

Chaudhari, Choromanska, Soatto, LeCun, Baldassi, Borgs, Chayes, Sagun, Zecchina 2017, "Entropy-SGD: Biasing Gradient
Descent Into Wide Valleys", both as Bisla, Wang, Choromanska 2022, "Low-Pass Filtering SGD …", coded them: gamma = 100
and 100 draws (the noise's standard deviation is 1 / gamma, so the paper's gamma is its square; the two constants are
as coded); 20 steps, g0 = 1e-4, eps = 1e-4, and g1 = 1e-3 without effect, because their count of steps stays 0;
`normalised` weights. Differs from their code in: mu_LE is of this oracle's batch, where they average over all
mini-batches of an epoch: ask once a batch and average.

Cost: 1 + draws forwards; `steps` gradients. Memory: one shard while perturbed (two vectors more where `normalised`);
mu_LE two vectors more. Communication: a pass's; one all-reduce.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from math import exp, log, nan, pi, sqrt
from statistics import fmean, stdev

from elastic_lsopt.errors import UserError
from elastic_lsopt.oracle.oracle import Oracle
from elastic_lsopt.probes.flatness.filter_norms import filter_norms
from elastic_lsopt.probes.flatness.neighbourhood import Neighbourhood, refuse_below_one, refuse_not_positive, resynced
from elastic_lsopt.probes.spectrum.operator import FIRST_DRAW
from elastic_lsopt.space.geometry import ParameterSpace
from elastic_lsopt.space.precision import full_precision

RATE, KEPT = 0.1, 0.75
"""eta' of the inner steps and the share that the running mean keeps."""


@dataclass(frozen=True)
class LocalEntropy:
    """`value` as coded, lower where more of the neighbourhood is low; `free_energy` is it without the constants."""

    value: float
    standard_error: float
    free_energy: float
    loss: float
    forwards: int
    seconds: float


@dataclass(frozen=True)
class LocalEntropyGradient:
    """`value` is mu_LE = `|w - <w'>|`."""

    value: float
    gradients: int
    seconds: float


@full_precision()
def local_entropy(
    space: ParameterSpace, oracle: Oracle, *, gamma: float = 100.0, draws: int = 100, normalised: bool = False
) -> LocalEntropy:
    """Local entropy by `draws` >= 1 under noise of standard deviation 1 / `gamma`, `gamma` > 0 (collective).

    Raises UserError for a setting out of range, NonFinite where a loss is inf or NaN.
    """
    refuse_not_positive("gamma", gamma)
    refuse_below_one("draws", draws)
    around = Neighbourhood(space, oracle, normalised)
    losses = [around.finite(around.noisy(i, 1 / gamma), f"under noise of 1/gamma={1 / gamma:g}") for i in range(draws)]
    lowest = min(losses)
    weights = [exp(lowest - x) for x in losses]
    free = lowest - log(fmean(weights))
    error = stdev(weights) / fmean(weights) / sqrt(draws) if draws > 1 else nan
    constants = space.layout.numel / 2 * log(2 * pi) - log(gamma) / 2
    return LocalEntropy(free - constants, error, free, around.loss, around.forwards, around.seconds)


@full_precision()
def local_entropy_gradient(
    space: ParameterSpace,
    oracle: Oracle,
    *,
    steps: int = 20,
    g0: float = 1e-4,
    noise: float = 1e-4,
    normalised: bool = False,
) -> LocalEntropyGradient:
    """mu_LE by `steps` >= 1 of Langevin dynamics; `g0` and `noise` (eps) >= 0 (collective).

    Raises UserError for a setting out of range, NonFinite where a loss or gradient is inf or NaN.
    """
    refuse_below_one("steps", steps)
    for name, value in (("g0", g0), ("noise", noise)):
        if not 0 <= value < float("inf"):
            raise UserError(f"{name}={value} must be a number >= 0.")
    began = time.monotonic()
    p = filter_norms(space) if normalised else None
    away, mean = space.zeros(), space.zeros()  # w' - w and <w'> - w, in the coordinates of p
    with resynced(space), space.perturbation() as walk:
        for i in range(steps):
            step = oracle.gradient().clone()
            if p is not None:
                step.mul_(p)
            step.add_(away, alpha=g0)
            if noise:
                step.add_(space.noise(0, FIRST_DRAW + i).vector(), alpha=noise / sqrt(RATE / 2))
            away.add_(step, alpha=-RATE)
            mean.mul_(KEPT).add_(away, alpha=1 - KEPT)
            walk.move(step if p is None else step.mul_(p), -RATE)
    return LocalEntropyGradient(space.norm(mean), steps, time.monotonic() - began)
