"""The largest or smallest eigenvalues by a block of vectors with bounded memory: LOBPCG, without a preconditioner.

    best X in the span of [X, P, R],   R = A X - X diag(lambda),   P = the part of the last step outside of X

The Rayleigh-Ritz problem is solved in fp64 between an orthonormal basis of the span, taken from its Gram matrix with
dependent directions dropped; P is made orthogonal to X (Hetmaniuk and Lehoucq 2006, "Basis selection in LOBPCG").
Converged vectors stay in the block but cost no further products (soft locking). `guard` more vectors than wanted speed
up the last ones.

Knyazev 2001, "Toward the optimal preconditioned eigensolver: Locally Optimal Block Preconditioned Conjugate Gradient
Method". Cost: up to k + guard products an iteration; memory: 8 (k + guard) vectors; two all-reduces of small matrices
and k + guard of a number an iteration.
"""

from __future__ import annotations

from typing import Literal, Unpack

import torch
from torch import Tensor

from elastic_lsopt.errors import NonFinite, UserError
from elastic_lsopt.oracle.oracle import Oracle
from elastic_lsopt.probes.spectrum.eigenpairs import Eigenpairs
from elastic_lsopt.probes.spectrum.operator import On, operator
from elastic_lsopt.probes.spectrum.orthonormal import orthonormalise_, whitening
from elastic_lsopt.space.basis import Basis
from elastic_lsopt.space.geometry import ParameterSpace
from elastic_lsopt.space.precision import full_precision


@full_precision()
def lobpcg(
    space: ParameterSpace,
    oracle: Oracle,
    *,
    k: int = 5,
    which: Literal["largest", "smallest"] = "largest",
    tolerance: float = 1e-3,
    max_iterations: int = 100,
    guard: int = 2,
    vectors: bool = False,
    basis_device: torch.device | str | None = None,
    **on: Unpack[On],
) -> Eigenpairs:
    """The k algebraically largest or smallest eigenvalues, descending (collective).

    `tolerance` > 0 is the largest residual as a share of the largest |eigenvalue| in the block. Raises UserError for k
    beyond the space and settings out of range, NonFinite where the curvature is inf or NaN.
    """
    a = operator(space, oracle, **on)
    a.refuse_more_than_there_is("k", k)
    if which not in ("largest", "smallest"):
        raise UserError(f"which={which!r} is unknown; use largest or smallest.")
    if max_iterations < 1 or guard < 0 or not tolerance > 0:
        raise UserError(
            f"max_iterations={max_iterations} must be >= 1, guard={guard} >= 0 and tolerance={tolerance} > 0."
        )
    m = min(k + guard, a.dimension)
    s, image = Basis(space, 3 * m, basis_device), Basis(space, 3 * m, basis_device)
    for i in range(m):
        s.append(a.direction(i))
    orthonormalise_(s)
    for q in s:
        image.append(a(q))
    values = _rotate(s, image, m, which)
    iteration = 0
    while True:
        residuals = [image[i].add_(s[i], alpha=-float(values[i])) for i in range(m)]
        lengths = [space.norm(r) for r in residuals]
        limit = tolerance * float(values.abs().max())
        converged = all(length <= limit for length in lengths[:k])
        if converged or iteration == max_iterations:
            break
        for r, length in zip(residuals, lengths, strict=True):
            if length > limit:
                s.append(r.mul_(1 / length))
        del residuals
        for i in range(len(image), len(s)):
            image.append(a(s[i]))
        values = _rotate(s, image, m, which)
        iteration += 1
    order = range(k) if which == "largest" else range(k - 1, -1, -1)
    kept = None
    if vectors:
        kept = Basis(space, k, basis_device)
        for i in order:
            kept.append(s[i])
    return Eigenpairs(
        tuple(float(values[i]) for i in order),
        tuple(lengths[i] for i in order),
        kept,
        converged,
        a.products,
        a.seconds,
        a.relative_error,
    )


def _rotate(s: Basis, image: Basis, m: int, which: str) -> Tensor:
    """Replace [X, P, R] by the best [X, P] in its span, and A of them likewise; the values of X, the best first."""
    gram, product = s.gram(), s.gram(image)
    if not bool(product.isfinite().all()):
        raise NonFinite("the curvature is inf or NaN: the loss is not smooth here.")
    white = whitening(gram, s.space.dtype)
    small = white @ product @ white.T
    values, columns = torch.linalg.eigh((small + small.T) / 2)
    if which == "largest":
        values, columns = values.flip(0), columns.flip(1)
    best = columns[:, :m].T @ white
    # In the whitened coordinates lengths and angles are Euclidean: P = best without its part in the last X, taken
    # off X and made orthonormal there. A short P is rounding that scaling would blow up, in A P as well.
    last = best.clone()
    last[:, : min(m, len(s))] = 0
    inside = last @ gram @ white.T
    inside = inside - inside @ columns[:, :m] @ columns[:, :m].T
    inside = inside[torch.linalg.vector_norm(inside, dim=1) > torch.finfo(s.space.dtype).eps ** 0.5]
    more = whitening(inside @ inside.T, s.space.dtype) @ inside @ white if len(inside) else best[:0]
    both = torch.cat([best, more])
    s.combine_all_(both)
    image.combine_all_(both)
    return values[:m]
