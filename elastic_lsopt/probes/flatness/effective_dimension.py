"""Effective dimension: the number of directions that the loss determines, against a regulariser z.

    sum_i lambda_i / (lambda_i + z)                              of eigenvalues
    n integral lambda / (lambda + z) rho(lambda) d lambda        of a spectral density: nodes, weights that sum to 1

MacKay 1992, "Bayesian Model Comparison and Backprop Nets"; Maddox, Benton, Wilson 2020, "Rethinking Parameter Counting
in Deep Models: Effective Dimensionality Revisited"; z = 1 as in Bisla, Wang, Choromanska 2022, "Low-Pass Filtering
SGD …", who take the eigenvalues of 100 Lanczos iterations. Eigenvalues <= 0 determine no direction and are left out:
lambda / (lambda + z) has a pole at -z.

Cost: none beside the spectrum's; no memory, no communication.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite

from elastic_lsopt.errors import NonFinite, UserError
from elastic_lsopt.probes.flatness.neighbourhood import refuse_not_positive


@dataclass(frozen=True)
class EffectiveDimension:
    """`left_out` is the number of dimensions with a curvature <= 0, which add nothing."""

    value: float
    left_out: float


def effective_dimension(
    eigenvalues: Sequence[float],
    *,
    weights: Sequence[float] | None = None,
    dimension: int = 1,
    regulariser: float = 1.0,
) -> EffectiveDimension:
    """Of eigenvalues, each counted once; or of a density's nodes, counted `weights` x `dimension` times.

        >>> effective_dimension([3.0, 1.0, -2.0])
        EffectiveDimension(value=1.25, left_out=1.0)

    `regulariser` > 0 is in units of the curvature. Raises UserError for settings out of range, NonFinite for
    eigenvalues that are inf or NaN.
    """
    refuse_not_positive("regulariser", regulariser)
    counts = [1.0] * len(eigenvalues) if weights is None else [w * dimension for w in weights]
    if len(counts) != len(eigenvalues):
        raise UserError(f"weights has {len(counts)} numbers for {len(eigenvalues)} eigenvalues; give one each.")
    if not all(isfinite(x) for x in (*eigenvalues, *counts)):
        raise NonFinite("the spectrum holds an eigenvalue or weight that is inf or NaN.")
    pairs = list(zip(eigenvalues, counts, strict=True))
    value = sum(n * x / (x + regulariser) for x, n in pairs if x > 0)
    return EffectiveDimension(value, sum(n for x, n in pairs if x <= 0))
