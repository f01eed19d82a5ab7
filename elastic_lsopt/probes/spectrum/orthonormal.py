"""An orthonormal basis of the span of sharded vectors, from their Gram matrix alone.

    G = Y Y' (rows y_i),  D^-1/2 G D^-1/2 = U diag(s) U',  Q = diag(s)^-1/2 U' D^-1/2 Y      D = diag(G); twice

Directions with s below rounding depend on the others and are dropped, where Cholesky-QR would fail. The second pass
takes off the rounding of the first, as in Cholesky-QR2 (Yamamoto, Nakatsukasa, Yanagisawa, Fukaya 2015, "Roundoff error
analysis of the CholeskyQR2 algorithm"; Stathopoulos and Wu 2002, "A block orthogonalization procedure with constant
synchronization requirements"). Cost: no products; memory: none (in place); one all-reduce of m^2 numbers a pass.
"""

from __future__ import annotations

import torch
from torch import Tensor

from elastic_lsopt.space.basis import Basis

ROUNDING = 100
"""Multiples of eps, of the largest s: a smaller one is rounding of the dot products."""


def whitening(gram: Tensor, dtype: torch.dtype) -> Tensor:
    """W (rank, m) such that W G W' = 1 on what is not rounding in vectors of that precision; fp64."""
    if not len(gram):
        return gram
    lengths = gram.diagonal().clamp(min=0).sqrt()
    scale = torch.where(lengths > 0, 1 / lengths, 0.0)
    s, u = torch.linalg.eigh(gram * scale[:, None] * scale)
    real = s > ROUNDING * torch.finfo(dtype).eps * s[-1].clamp(min=torch.finfo(torch.float64).tiny)
    return (u[:, real] * s[real].rsqrt()).T * scale


def orthonormalise_(basis: Basis) -> None:
    """Replace the vectors by an orthonormal basis of their span: fewer where they depend on each other (collective)."""
    for _ in range(2):
        if len(basis):
            basis.combine_all_(whitening(basis.gram(), basis.space.dtype))
