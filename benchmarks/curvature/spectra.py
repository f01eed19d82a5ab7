"""The five largest eigenvalues and the spectral density of the Hessian beside hessian-eigenthings and PyHessian.

Times are from nothing (an operator is made, graphs are built; checks that no peer has are off) to the eigenpairs.
Every residual |H x - lambda x| is measured anew with one of our products, as a share of the largest eigenvalue.
hessian-eigenthings takes a number of
steps and has no rule to stop: it is measured with its default, doubled until it says that all have converged, and with
the fewest that would do (`fewest_steps`, whose search is not in the time). PyHessian stops by the change of an
eigenvalue, whose error is the square of its vector's: it is measured with its default, a change of 1e-3, which leaves
residuals far above ours, and "tight", with 1e-6.

A density takes 800 products a side (10 vectors x 80 steps, two vectors a turn), so it is of a GPT of half the width:
vectors and products shrink alike.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from math import sqrt
from statistics import fmean, stdev

import torch
from torch import Tensor

import elastic_lsopt as lso
from benchmarks.curvature.model import LOSS, SHAPES, own_batch, trained
from benchmarks.curvature.peers import (
    Pairs,
    density_by_eigenthings,
    fewest_steps,
    top_by_eigenthings,
    top_by_pyhessian,
)
from benchmarks.timing import ratio_of, rounds
from benchmarks.workers import on_ranks
from elastic_lsopt.oracle.oracle import Oracle
from elastic_lsopt.probes.spectrum.lanczos import lanczos
from elastic_lsopt.probes.spectrum.spectral_density import spectral_density
from elastic_lsopt.space.geometry import ParameterSpace

COUNT, TOLERANCE = 5, 1e-3
MOST = 100
"""Products that PyHessian may take for one eigenvalue: its default."""
PAIRS = 2
STEPS = 80


def top(size: str, *, most: int = MOST) -> dict[str, object]:
    """Eigenpairs on one process, each solver's times in turns; residuals, and the cost in gradients. PyHessian gets
    `most` products for an eigenvalue, and five times as many where it is to be exact."""
    shape = SHAPES[size]
    model, batch = trained(shape), own_batch(shape)
    beside = copy.deepcopy(model)
    steps = fewest_steps(beside, batch, COUNT, TOLERANCE)
    found: dict[str, Pairs] = {}
    products = 0

    def ours() -> None:
        nonlocal products
        space, oracle = lso.attach(model, LOSS, [batch], checked=False)
        pairs = lanczos(space, oracle, k=COUNT, tolerance=TOLERANCE, vectors=True)
        assert pairs.vectors is not None and pairs.converged and pairs.relative_error is None
        products = pairs.products
        found["ours"] = list(pairs.eigenvalues), [torch.cat([*v.tensors]) for v in pairs.vectors]
        oracle.products.close()

    def by_eigenthings(name: str, steps: int | None) -> None:
        found[name] = top_by_eigenthings(beside, batch, COUNT, TOLERANCE, steps)

    def by_pyhessian(name: str, change: float, most: int) -> None:
        found[name] = top_by_pyhessian(beside, batch, COUNT, change, most)

    space, oracle = lso.attach(model, LOSS, [batch], products="kept", checked=False)

    def ten_gradients() -> None:
        for _ in range(10):
            oracle.gradient()

    times = rounds(
        PAIRS,
        warm_up=False,
        gradient=ten_gradients,
        ours=ours,
        hessian_eigenthings=lambda: by_eigenthings("hessian_eigenthings", None),
        hessian_eigenthings_fewest_steps=lambda: by_eigenthings("hessian_eigenthings_fewest_steps", steps),
        pyhessian=lambda: by_pyhessian("pyhessian", TOLERANCE, most),
        pyhessian_tight=lambda: by_pyhessian("pyhessian_tight", TOLERANCE**2, 5 * most),
    )
    times["gradient"] = [t / 10 for t in times["gradient"]]
    figures: dict[str, object] = {"top5_products": products, "top5_hessian_eigenthings_fewest_steps": steps}
    for name in times:
        if name not in ("ours", "gradient"):
            figures |= ratio_of(times[name], times["ours"]).figures(f"top5_{name}_of_ours")
    for name, (values, vectors) in found.items():
        figures |= ratio_of(times[name], times["gradient"]).figures(f"top5_{name}_in_gradients")
        figures[f"top5_{name}_eigenvalues"] = values
        figures[f"top5_{name}_largest_residual"] = largest_residual(space, oracle, values, vectors)
        best = max(abs(a - b) / abs(b) for a, b in zip(sorted(values), sorted(found["ours"][0]), strict=True))
        figures[f"top5_{name}_largest_difference_from_ours"] = best
    return figures


def largest_residual(
    space: ParameterSpace, oracle: Oracle, values: Sequence[float], vectors: Sequence[Tensor]
) -> float:
    """The largest |H x - lambda x| / |x|, as a share of the largest |lambda| (one process)."""
    residuals, x = [], space.zeros()
    for value, vector in zip(values, vectors, strict=True):
        parts = vector.split([t.numel() for t in x.tensors])
        for t, part in zip(x.tensors, parts, strict=True):
            t.copy_(part)
        residuals.append(space.norm(oracle.hvp(x).add_(x, alpha=-value)) / space.norm(x))
    return max(residuals) / max(abs(v) for v in values)


def density(size: str, vectors: int = 2, steps: int = STEPS, turns: int = 5) -> dict[str, object]:
    """The spectral density on one process: `vectors` a turn, and the trace that follows from all of them."""
    shape = replace(SHAPES[size], width=SHAPES[size].width // 2)
    model, batch = trained(shape), own_batch(shape)
    beside = copy.deepcopy(model)
    n = sum(p.numel() for p in model.parameters())
    first_moments: dict[str, list[float]] = {"ours": [], "hessian_eigenthings": []}

    def by_eigenthings(vectors: int = vectors, steps: int = steps) -> None:
        known = first_moments["hessian_eigenthings"]
        made = density_by_eigenthings(beside, batch, vectors, steps, seed=len(known))
        known += (made.raw_eigenvalues.nan_to_num() * made.raw_weights).sum(1).tolist()

    def by_ours(vectors: int = vectors, steps: int = steps) -> None:
        known = first_moments["ours"]
        space, oracle = lso.attach(model, LOSS, [batch], seed=len(known), checked=False)
        made = spectral_density(space, oracle, vectors=vectors, steps=steps)
        assert made.relative_error is None, "differences, where all others are exact"
        oracle.products.close()
        known += [sum(t * w for t, w in zip(*each, strict=True)) for each in zip(made.nodes, made.weights, strict=True)]

    by_eigenthings(1, 2)
    by_ours(1, 2)
    for each in first_moments.values():
        each.clear()
    times = rounds(turns, warm_up=False, ours=by_ours, hessian_eigenthings=by_eigenthings)
    figures: dict[str, object] = {"spectral_density_parameters": n}
    for name, each in first_moments.items():
        figures[f"spectral_density_{name}_trace"] = n * fmean(each)
        figures[f"spectral_density_{name}_trace_standard_error"] = n * stdev(each) / sqrt(len(each))
    ratio = ratio_of(times["hessian_eigenthings"], times["ours"])
    return figures | ratio.figures("spectral_density_hessian_eigenthings_of_ours")


def run() -> dict[str, object]:
    """Both, each in a process of its own with one thread."""
    size = "gpu" if torch.cuda.is_available() else "cpu"
    figures: dict[str, object] = {"size": size}
    for case in ("top", "density"):
        figures |= on_ranks(f"benchmarks.curvature.spectra:{case}", processes=1, size=size)
    return figures
