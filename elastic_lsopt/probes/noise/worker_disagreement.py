"""Sharp directions without a Hessian: where workers of local SGD come apart before they are averaged.

    delta_m = x_m - mean_m x_m           G_ij = <delta_i, delta_j>,  G = V diag(s) V'
    q_k = s_k^(-1/2) sum_m V_mk delta_m                 orthonormal, the k-th direction of disagreement
    captured_k = sum_{j <= k} <q_j, g>^2 / |g|^2        share of the gradient in the first k of them

Dimlioglu, Topollai, Choromanska 2026, "Worker Disagreement Reveals Sharp Directions in Local SGD". Deltas of several
rounds may be put together. With `eigenvectors` of the Hessian also the share of the gradient's part in their span that
lies in the span of the q.

Cost: one gradient, no product; memory: two vectors a worker and round (on the CPU if asked); two all-reduces.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from elastic_lsopt.errors import NonFinite, UserError
from elastic_lsopt.oracle.oracle import Oracle
from elastic_lsopt.space.basis import Basis
from elastic_lsopt.space.geometry import ParameterSpace
from elastic_lsopt.space.precision import full_precision
from elastic_lsopt.space.vector import Vector

NEGLIGIBLE = {torch.float64: 1e-13, torch.float32: 1e-6}
"""Of the largest strength: below that a direction is rounding (deltas of a round sum to 0, so one always is)."""


@dataclass(frozen=True)
class WorkerDisagreement:
    """`strengths` are s_k over the number of deltas, falling: the variance along `directions`, which are orthonormal.

    `captured` is the share of the gradient in the first k directions, k = 1, 2, …; `captured_of_eigenspace` that of
    its part in the given eigenspace, in all directions (None: none was given). `gram` is G, fp64.
    """

    strengths: tuple[float, ...]
    captured: tuple[float, ...]
    captured_of_eigenspace: float | None
    directions: Basis
    gram: torch.Tensor
    gradients: int
    seconds: float


@full_precision()
def worker_disagreement(
    space: ParameterSpace,
    oracle: Oracle,
    *,
    rounds: Sequence[Sequence[Vector]],
    keep: int | None = None,
    eigenvectors: Basis | None = None,
    device: torch.device | str | None = None,
) -> WorkerDisagreement:
    """The directions of workers' weights, >= 2 a round, just before averaging; the gradient is that at the weights.

    `keep` >= 1 is the most directions to keep (None: all that are not rounding). Collective. Raises UserError for fewer
    than 2 workers, workers that agree, and a gradient of 0; NonFinite where weights or gradient are inf or NaN.
    """
    began = time.monotonic()
    if not rounds or any(len(workers) < 2 for workers in rounds):
        raise UserError(
            "rounds must hold the weights of at least 2 workers each: one worker has nobody to differ from."
        )
    if keep is not None and keep < 1:
        raise UserError(f"keep={keep} must be >= 1.")
    deltas = Basis(space, sum(len(workers) for workers in rounds), device)
    for workers in rounds:
        mean = space.zeros()
        for x in workers:
            mean.add_(x, alpha=1 / len(workers))
        for x in workers:
            deltas.append(x - mean)
    gram = deltas.gram()
    if not bool(torch.isfinite(gram).all()):
        raise NonFinite("the inner products of the workers' differences hold inf or NaN.")
    s, v = torch.linalg.eigh(gram)
    s, v = s.flip(0), v.flip(1)
    if not s[0] > 0:
        raise UserError("all workers hold the same weights, so they disagree nowhere; let them train apart first.")
    count = int((s > NEGLIGIBLE[space.dtype] * s[0]).sum())
    count = count if keep is None else min(keep, count)
    s, v = s[:count], v[:, :count]
    deltas.combine_all_((v / s.sqrt()).T)
    g = oracle.gradient()
    square = space.norm(g) ** 2
    if not square:
        raise UserError("the gradient is 0, so no share of it can be captured.")
    inside = deltas.coefficients(g).square().cumsum(0) / square
    of_eigenspace = None
    if eigenvectors is not None:
        part = eigenvectors.combine(eigenvectors.coefficients(g))
        length = space.norm(part) ** 2
        of_eigenspace = float(deltas.coefficients(part).square().sum()) / length if length else 0.0
    strengths, seconds = tuple((s / len(gram)).tolist()), time.monotonic() - began
    return WorkerDisagreement(strengths, tuple(inside.tolist()), of_eigenspace, deltas, gram, 1, seconds)
