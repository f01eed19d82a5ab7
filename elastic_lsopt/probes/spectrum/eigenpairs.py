"""Some eigenvalues of a symmetric matrix, how far each is from being one, and their vectors: what eigensolvers return.

residual_i = |A x_i - lambda_i x_i|, |x_i| = 1: an eigenvalue lies within it of lambda_i (Weyl)
"""

from __future__ import annotations

from dataclasses import dataclass

from elastic_lsopt.space.basis import Basis


@dataclass(frozen=True)
class Eigenpairs:
    """`residuals` in the units of the eigenvalues; `vectors` in their order, orthonormal (None: not asked for).

    `converged`: all residuals met the tolerance. `relative_error` is that of the products (None: exact to rounding),
    which no residual can show.
    """

    eigenvalues: tuple[float, ...]
    residuals: tuple[float, ...]
    vectors: Basis | None
    converged: bool
    products: int
    seconds: float
    relative_error: float | None

    @property
    def relative_residuals(self) -> tuple[float, ...]:
        """As shares of the largest |eigenvalue| among them."""
        largest = max((abs(x) for x in self.eigenvalues), default=0.0)
        return tuple(r / largest if largest else 0.0 for r in self.residuals)
