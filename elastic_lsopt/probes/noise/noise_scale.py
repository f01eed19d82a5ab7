"""The gradient noise scale: the batch size at which noise and signal in the gradient are equal.

    g_i the gradient of batch i of b_i samples, N = sum_i b_i, g = sum_i b_i g_i / N
    tr S   = sum_i b_i |g_i - g|^2 / (K - 1)          the trace of one sample's covariance S
    |G|^2  = |g|^2 - tr S / N                         the square of the true gradient
    B_simple = tr S / |G|^2          B_noise = tr H S / G'HG          with H-products in place of the products

McCandlish, Kaplan, Amodei and others 2018, "An Empirical Model of Large-Batch Training", equations 2.8, 2.9 and A.1.
tr S and |G|^2 are unbiased; their ratio is not, which the jackknife corrects for to first order. A batch much larger
than B_noise is wasted; B_simple is what they use in its place, and as the estimate of the critical batch. Differs in:
the paper's estimator has two batch sizes, this one K batches of any sizes, of which theirs is the case K = 2 parts.

Cost: K gradients (`curvature`: and K products); memory: K vectors (2 K), on the CPU if asked; one all-reduce of
K^2 numbers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf, isfinite, nan, sqrt

import torch
from torch import Tensor

from elastic_lsopt.errors import NonFinite, UserError
from elastic_lsopt.oracle.oracle import Oracle
from elastic_lsopt.space.basis import Basis
from elastic_lsopt.space.geometry import ParameterSpace
from elastic_lsopt.space.precision import full_precision


@dataclass(frozen=True)
class NoiseScale:
    """`value` is B_simple in samples (inf: no signal was seen), its standard error by the jackknife over batches.

    `trace` is tr S, `square` |G|^2 (may be < 0 where noise hides it). `hessian_value` is B_noise (nan: not asked for).
    """

    value: float
    standard_error: float
    trace: float
    square: float
    trace_error: float
    square_error: float
    hessian_value: float
    gradients: int
    products: int
    seconds: float

    @property
    def critical_batch(self) -> float:
        """Samples: B_noise where measured, else B_simple. There a step is worth half of one without noise."""
        return self.value if self.hessian_value != self.hessian_value else self.hessian_value

    def efficiency(self, batch: int) -> float:
        """The worth of a step on `batch` samples, as a share of a step without noise: 1 / (1 + B_crit / batch)."""
        return 1 / (1 + self.critical_batch / batch)


@full_precision()
def noise_scale(
    space: ParameterSpace,
    oracles: Sequence[Oracle],
    *,
    samples: Sequence[float] | None = None,
    curvature: Oracle | None = None,
    device: torch.device | str | None = None,
) -> NoiseScale:
    """Of at least 2 independent batches, each an oracle of its own; 10 or more for an error to trust (collective).

    `samples` are the batches' sizes (None: what the oracles count), `curvature` an oracle whose Hessian gives B_noise.
    Raises UserError for fewer than 2 batches, for unusable sizes, and where all gradients are 0; NonFinite where a
    loss, gradient or product is inf or NaN.
    """
    began = time.monotonic()
    if len(oracles) < 2:
        raise UserError(f"the noise scale is measured between batches: got {len(oracles)}, needs at least 2.")
    sizes = [getattr(o, "samples", nan) for o in oracles] if samples is None else list(samples)
    if len(sizes) != len(oracles) or not all(isfinite(b) and b > 0 for b in sizes):
        raise UserError(f"samples={sizes} must hold one number > 0 for each of the {len(oracles)} batches.")
    gradients = Basis(space, len(oracles), device)
    for o in oracles:
        gradients.append(o.gradient())
    scale = from_gram(gradients.gram(), sizes)
    hessian_value, products = nan, 0
    if curvature is not None:
        images, products = Basis(space, len(oracles), device), len(oracles)
        for g in gradients:
            images.append(curvature.hvp(g))
        trace, square = _estimates(gradients.gram(images), torch.tensor(sizes, dtype=torch.float64))
        hessian_value = _ratio(trace, square)
    if scale is None:
        raise UserError("the gradient of every batch is 0, so there is neither signal nor noise to compare.")
    return NoiseScale(*scale, hessian_value, len(oracles), products, time.monotonic() - began)


def from_gram(gram: Tensor, sizes: Sequence[float]) -> tuple[float, float, float, float, float, float] | None:
    """B_simple and its error, tr S, |G|^2 and their errors from <g_i, g_j>, fp64 (K, K); None where all are 0.

    Errors are nan for 2 batches. Raises NonFinite where a product is inf or NaN.
    """
    if not bool(torch.isfinite(gram).all()):
        raise NonFinite("the inner products of the batches' gradients hold inf or NaN.")
    if not gram.diagonal().sum() > 0:
        return None
    b = torch.tensor(list(sizes), dtype=torch.float64)
    trace, square = _estimates(gram, b)
    if len(b) < 3:
        return _ratio(trace, square), nan, trace, square, nan, nan
    left_out: list[tuple[float, float]] = []
    for i in range(len(b)):
        kept = torch.arange(len(b)) != i
        left_out.append(_estimates(gram[kept][:, kept], b[kept]))
    corrected, error = _jackknife(lambda e: _ratio(*e), (trace, square), left_out)
    value = corrected if isfinite(corrected) and corrected > 0 else _ratio(trace, square)
    trace_error = _jackknife(lambda e: e[0], (trace, square), left_out)[1]
    square_error = _jackknife(lambda e: e[1], (trace, square), left_out)[1]
    return value, error, trace, square, trace_error, square_error


def _estimates(gram: Tensor, b: Tensor) -> tuple[float, float]:
    """tr S and |G|^2, or the same between H; exact expectations for any sizes b."""
    total = b.sum()
    both = float(b @ gram @ b / total**2)
    trace = (float(b @ gram.diagonal()) - float(total) * both) / (len(b) - 1)
    return trace, both - trace / float(total)


def _ratio(trace: float, square: float) -> float:
    return trace / square if square > 0 else inf


def _jackknife(
    of: Callable[[tuple[float, float]], float], whole: tuple[float, float], left_out: Sequence[tuple[float, float]]
) -> tuple[float, float]:
    """The estimate without its first-order bias, and its standard error (nan where one left out is inf)."""
    k, values = len(left_out), [of(e) for e in left_out]
    if not all(isfinite(v) for v in (of(whole), *values)):
        return of(whole), nan
    mean = sum(values) / k
    error = sqrt((k - 1) / k * sum((v - mean) ** 2 for v in values))
    return k * of(whole) - (k - 1) * mean, error
