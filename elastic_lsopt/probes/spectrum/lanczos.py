"""The largest and smallest eigenvalues of a symmetric matrix, by Lanczos with full re-orthogonalisation.

    T = Q' A Q,   T s = theta s   ->   lambda ~ theta,  x ~ Q s,  |A x - theta x| = |beta_m s_m|

All wanted residuals are looked at after every product, so that not one is made too many; a thick restart keeps the
best Ritz vectors where the basis is full. Beside an invariant space (beta = 0) it goes on from a random direction until
that has shown that no copy of a wanted eigenvalue is missing. Each residual is computed from the recurrence's own
coefficients, not from T alone: it is that of the products as they were made, also where these are differences.

Lanczos 1950, "An iteration method for the solution of the eigenvalue problem …"; Wu and Simon 2000, "Thick-restart
Lanczos method for large symmetric eigenvalue problems". Cost: products until converged, at most `max_products`;
memory: 4 vectors and one per product, up to `capacity` (+ the eigenvectors that are asked for); three all-reduces a
product.
"""

from __future__ import annotations

from typing import Literal, Unpack, get_args

import torch
from torch import Tensor

from elastic_lsopt.errors import UserError
from elastic_lsopt.oracle.oracle import Oracle
from elastic_lsopt.probes.spectrum.eigenpairs import Eigenpairs
from elastic_lsopt.probes.spectrum.krylov import Krylov, Ritz
from elastic_lsopt.probes.spectrum.operator import On, operator
from elastic_lsopt.space.basis import Basis
from elastic_lsopt.space.geometry import ParameterSpace
from elastic_lsopt.space.precision import full_precision

Which = Literal["largest", "smallest", "both"]


@full_precision()
def lanczos(
    space: ParameterSpace,
    oracle: Oracle,
    *,
    k: int = 5,
    which: Which = "largest",
    tolerance: float = 1e-3,
    max_products: int = 300,
    capacity: int = 100,
    vectors: bool = False,
    basis_device: torch.device | str | None = None,
    **on: Unpack[On],
) -> Eigenpairs:
    """The k largest or smallest eigenvalues (algebraically), or k of each end; in descending order (collective).

        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> loss_fn = lambda model, x: model(x).square().mean()
        >>> space, oracle = lso.attach(model, loss_fn, [torch.tensor([[3.0, 0.0], [0.0, 1.0]])])
        >>> [round(value, 3) for value in lanczos(space, oracle, k=2).eigenvalues]
        [9.0, 1.0]

    `tolerance` > 0 is the largest residual as a share of the largest |eigenvalue| seen. `capacity` >= wanted + 3 bounds
    the basis, `basis_device` "cpu" keeps it in host memory. Not there after `max_products`: `converged` is False.
    Raises UserError for more pairs than the space has and settings out of range, NonFinite for inf and NaN.
    """
    a = operator(space, oracle, **on)
    if which not in get_args(Which):
        raise UserError(f"which={which!r} is unknown; use one of {', '.join(get_args(Which))}.")
    wanted = 2 * k if which == "both" else k
    a.refuse_more_than_there_is("k" if wanted == k else "2 k", wanted)
    room = min(capacity, a.dimension)
    if room < min(wanted + 3, a.dimension):
        raise UserError(f"capacity={capacity} must be >= {wanted + 3}: the {wanted} wanted vectors and 3 more.")
    if max_products < wanted:
        raise UserError(f"max_products={max_products} must be >= {wanted}, the number of wanted eigenvalues.")
    if not tolerance > 0:
        raise UserError(f"tolerance={tolerance} must be > 0.")
    low = 0 if which == "largest" else k
    high = wanted - low
    krylov, made, done = Krylov(a, a.direction(0), room, basis_device), 0, False
    while not done and made < max_products:
        if len(krylov) == room:
            krylov.restart(_kept(krylov.ritz().columns, low, high))
        krylov.step()
        made += 1
        done = krylov.complete or _converged(krylov, low, high, tolerance)
    ritz = krylov.ritz()
    chosen = _ends(len(krylov), low, high).flip(0)
    kept = None
    if vectors:
        kept = Basis(space, wanted, basis_device)
        for i in chosen.tolist():
            kept.append(krylov.basis.combine(ritz.columns[:, i]))
    return Eigenpairs(
        tuple(ritz.values[chosen].tolist()),
        tuple(ritz.residuals[chosen].tolist()),
        kept,
        done,
        a.products,
        a.seconds,
        a.relative_error,
    )


def _ends(m: int, low: int, high: int) -> Tensor:
    """Indices of the `low` lowest and `high` highest of m ascending values."""
    return torch.cat([torch.arange(low), torch.arange(m - high, m)])


def _kept(columns: Tensor, low: int, high: int) -> Tensor:
    """The wanted Ritz vectors and half of the others, those next to them: what a restart goes on from."""
    room = columns.shape[1]
    extra = (room - low - high) // 2
    more_low = extra * low // (low + high)
    return columns[:, _ends(room, low + more_low, high + extra - more_low)]


def _converged(krylov: Krylov, low: int, high: int, tolerance: float) -> bool:
    if len(krylov) < low + high:
        return False
    ritz = krylov.ritz()
    limit = tolerance * float(ritz.values.abs().max())
    if bool((ritz.residuals[_ends(len(krylov), low, high)] > limit).any()):
        return False
    return (not krylov.newest and not krylov.invariant) or _nothing_beyond(krylov, ritz, low, high, limit)


def _nothing_beyond(krylov: Krylov, ritz: Ritz, low: int, high: int, limit: float) -> bool:
    """Whether the part since the last invariant space has shown that no wanted eigenvalue is still missing."""
    if not krylov.newest:
        return False
    newest = krylov.newest_ritz()
    ends: list[tuple[Tensor, Tensor]] = []
    if high:
        ends.append((newest.residuals[-1], newest.values[-1] - ritz.values[-high]))
    if low:
        ends.append((newest.residuals[0], ritz.values[low - 1] - newest.values[0]))
    return all(float(residual) <= limit and float(beyond) <= limit for residual, beyond in ends)
