"""The peers on one process: hessian-eigenthings, PyHessian and curvlinops on the same weights, batch and loss.

Those that differentiate twice run attention by its MATH backend, as they must (and ours does by itself).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.curvature.model import CRITERION, Batch, mean_loss

Pairs = tuple[list[float], list[Tensor]]
"""Eigenvalues and flat eigenvectors of length 1."""
LONGEST = 80
"""Lanczos steps at which a search for the right number ends."""


def twice() -> Any:
    """Inside, attention can be differentiated twice."""
    return sdpa_kernel(SDPBackend.MATH)


def eigenthings(model: nn.Module, batch: Batch, method: Literal["autograd", "finite_difference"] = "autograd") -> Any:
    """hessian-eigenthings' operator."""
    from hessian_eigenthings.operators import HessianOperator

    return HessianOperator(model, [batch], mean_loss, method=method)


def products(model: nn.Module, batch: Batch) -> dict[str, Callable[[Tensor], Tensor]]:
    """Each peer's product with a flat vector."""
    from curvlinops import HessianLinearOperator

    exact, differences = eigenthings(model, batch), eigenthings(model, batch, "finite_difference")
    operator = HessianLinearOperator(model, CRITERION, list(model.parameters()), [batch], check_deterministic=False)

    def double_backward(apply: Callable[[Tensor], Tensor], v: Tensor) -> Tensor:
        with twice():
            return apply(v)

    parameters = list(model.parameters())

    def plain(v: Tensor) -> Tensor:
        g = torch.autograd.grad(mean_loss(model, batch), parameters, create_graph=True)
        parts = [part.view_as(p) for part, p in zip(v.split([p.numel() for p in parameters]), parameters, strict=True)]
        return torch.cat([h.reshape(-1) for h in torch.autograd.grad(g, parameters, parts)])

    return {
        "plain_double_backward": partial(double_backward, plain),
        "hessian_eigenthings_autograd": partial(double_backward, exact.matvec),
        "hessian_eigenthings_differences": differences.matvec,
        "curvlinops": partial(double_backward, lambda v: operator @ v),
    }


def fewest_steps(model: nn.Module, batch: Batch, count: int, tolerance: float) -> int:
    """The fewest Lanczos steps after which hessian-eigenthings' own residuals are at most tolerance of the largest
    eigenvalue (at most LONGEST): what nobody knows before.
    """
    from hessian_eigenthings.algorithms import lanczos_tridiagonal

    operator = eigenthings(model, batch)
    longest = min(LONGEST, operator.size)
    start = torch.randn(operator.size, generator=torch.Generator().manual_seed(0)).to(operator.device)
    with twice():
        run = lanczos_tridiagonal(operator, start, longest)
    alphas, betas = run.alphas.double().cpu(), [*run.betas.tolist(), run.last_beta]
    for m in range(count, len(alphas)):
        off = torch.tensor(betas[: m - 1], dtype=torch.float64)
        values, vectors = torch.linalg.eigh(torch.diag(alphas[:m]) + torch.diag(off, 1) + torch.diag(off, -1))
        worst = vectors[-1, -count:].abs().max().item() * betas[m - 1]
        if worst <= tolerance * values.abs().max().item():
            return m
    return longest


def top_by_eigenthings(model: nn.Module, batch: Batch, count: int, tolerance: float, steps: int | None = None) -> Pairs:
    """The largest eigenvalues by its Lanczos with full re-orthogonalisation, in so many steps.

    It has no rule to stop. None: twice `count`, which is its default, and twice as many as before until it says that
    all have converged.
    """
    from hessian_eigenthings.algorithms import lanczos

    operator, most = eigenthings(model, batch), steps or 2 * count
    while True:
        with twice():
            found = lanczos(
                operator, k=count, max_iter=most, tol=tolerance, which="LA", reorthogonalize=True, seed=0
            )  # fmt: skip
        if steps or found.converged.all() or most >= LONGEST:
            return found.eigenvalues.tolist(), list(found.eigenvectors)
        most *= 2


def top_by_pyhessian(model: nn.Module, batch: Batch, count: int, tolerance: float, most: int) -> Pairs:
    """The eigenvalues of largest magnitude by power iteration with deflation, at most `most` products each."""
    from pyhessian import hessian

    torch.manual_seed(0)
    with twice(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its backward makes a cycle of a parameter and its gradient: cut below
        solver = hessian(model, CRITERION, data=batch, cuda=batch[0].is_cuda)
        values, vectors = solver.eigenvalues(maxIter=most, tol=tolerance, top_n=count)
    model.zero_grad()
    return values, [torch.cat([t.reshape(-1) for t in v]) for v in vectors]


def density_by_eigenthings(model: nn.Module, batch: Batch, vectors: int, steps: int, seed: int) -> Any:
    """Its stochastic Lanczos quadrature."""
    from hessian_eigenthings.algorithms import spectral_density

    with twice():
        return spectral_density(eigenthings(model, batch), num_runs=vectors, lanczos_steps=steps, seed=seed)
