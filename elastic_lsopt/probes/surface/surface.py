"""The loss on a line or a plane through the present weights w.

    L(w + a d1)                 a in alphas
    L(w + a d1 + b d2)          a in alphas, b in betas

Along random directions (filter-normalised: a = 1 moves by the length of the weight matrices), eigenvectors of the
curvature, or principal components of a trajectory (both of length 1: a counts in units of the weights).

Goodfellow, Vinyals, Saxe 2015, "Qualitatively characterizing neural network optimization problems"; Li, Xu, Taylor,
Studer, Goldstein 2018, "Visualizing the Loss Landscape of Neural Nets". Their code sets weights whole; here each point
is perturbed from w itself, so no point depends on the others or on the order. Another centre: call it inside
`space.perturbed(...)`.
Cost: one forward of the batch a point; memory: one vector a direction, one for the sum (2-D), one while perturbed;
communication: that of a perturbation and a forward a point.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Literal

import torch

from elastic_lsopt.errors import NonFinite, UserError
from elastic_lsopt.oracle.oracle import Oracle
from elastic_lsopt.probes.flatness.filter_normalisation import filter_normalised
from elastic_lsopt.probes.spectrum.operator import FIRST_DRAW
from elastic_lsopt.space.basis import Basis
from elastic_lsopt.space.geometry import ParameterSpace
from elastic_lsopt.space.precision import full_precision
from elastic_lsopt.space.vector import Vector

GRID = tuple(i / 10 for i in range(-10, 11))


@dataclass(frozen=True)
class Surface:
    """`losses[j][i]` belongs to alphas[i] and betas[j]; a line has the one row betas = (0.0,).

    A loss may be inf or NaN far out. `kind` says what the directions are.
    """

    alphas: tuple[float, ...]
    betas: tuple[float, ...]
    losses: tuple[tuple[float, ...], ...]
    centre: float
    kind: str
    forwards: int
    seconds: float


@dataclass(frozen=True)
class Projection:
    """Points' coordinates on a line or plane, and how far off it each one is."""

    coordinates: tuple[tuple[float, ...], ...]
    distances: tuple[float, ...]


@full_precision()
def surface(
    space: ParameterSpace,
    oracle: Oracle,
    *,
    along: Literal["random"] | Sequence[Vector] | Basis = "random",
    dimensions: int = 2,
    alphas: Sequence[float] = GRID,
    betas: Sequence[float] | None = None,
    kind: str | None = None,
    draw: int = 0,
) -> Surface:
    """The loss at every pair of alphas and betas (default: the alphas), in units of the directions (collective).

    `along` gives the directions, of which the first `dimensions` (1 or 2) are used; `kind` is their name in the
    result; `draw` numbers the random ones. The weights are back bit for bit.
    Raises UserError for too few directions or an empty or infinite grid, NonFinite where the loss at the centre is.
    """
    began = time.monotonic()
    if dimensions not in (1, 2):
        raise UserError(f"dimensions={dimensions} must be 1 or 2.")
    a = _grid("alphas", alphas)
    b = (0.0,) if dimensions == 1 else _grid("betas", alphas if betas is None else betas)
    directions = _directions(space, along, dimensions, draw)
    centre = oracle.loss()
    if not isfinite(centre):
        raise NonFinite(f"the loss at the centre of the surface is {centre}.")
    rows = tuple(tuple(_loss_at(space, oracle, directions, (x, y)) for x in a) for y in b)
    name = kind or ("random" if isinstance(along, str) else "given")
    return Surface(a, b, rows, centre, name, len(a) * len(b) + 1, time.monotonic() - began)


def random_direction(space: ParameterSpace, draw: int = 0) -> Vector:
    """A Gaussian direction, filter-normalised at the present weights; the same at any world size."""
    return filter_normalised(space, space.noise(0, FIRST_DRAW + draw).vector())


@full_precision()
def project(
    space: ParameterSpace,
    points: Iterable[Vector],
    along: Sequence[Vector] | Basis,
    *,
    dimensions: int = 2,
    origin: Vector | None = None,
) -> Projection:
    """The nearest place to each point on the plane through `origin` (default: the present weights) (collective).

    Directions need not be orthogonal. For a trajectory's window of differences, `origin` is its last one. Memory: two
    vectors and the directions; two all-reduces a point.
    Raises UserError for too few directions or dependent ones.
    """
    directions = Basis(space, dimensions)
    for d in _directions(space, along, dimensions, 0):
        directions.append(d)
    gram = directions.gram()
    values = torch.linalg.eigvalsh(gram)
    if not values[0] > torch.finfo(space.dtype).eps * values[-1]:
        raise UserError("the directions of the plane are parallel or zero; give independent ones.")
    centre = space.weights if origin is None else origin
    coordinates, distances = [], []
    for p in points:
        away = p - centre
        c = torch.linalg.solve(gram, directions.coefficients(away))
        coordinates.append(tuple(c.tolist()))
        distances.append(space.norm(directions.project_out_(away, c)))
    return Projection(tuple(coordinates), tuple(distances))


def _loss_at(space: ParameterSpace, oracle: Oracle, directions: list[Vector], at: tuple[float, float]) -> float:
    step, scale = directions[0], at[0]
    if len(directions) > 1:
        step, scale = (directions[0] * at[0]).add_(directions[1], alpha=at[1]), 1.0
    with space.perturbed(step, scale):
        return oracle.loss()


def _directions(
    space: ParameterSpace, along: Literal["random"] | Sequence[Vector] | Basis, dimensions: int, draw: int
) -> list[Vector]:
    if isinstance(along, str):
        if along != "random":
            raise UserError(f"along={along!r} is unknown; use random, or give vectors.")
        return [random_direction(space, dimensions * draw + i) for i in range(dimensions)]
    if len(along) < dimensions:
        raise UserError(f"along holds {len(along)} direction(s), but dimensions={dimensions}; give as many.")
    return [along[i] for i in range(dimensions)]


def _grid(name: str, values: Sequence[float]) -> tuple[float, ...]:
    out = tuple(float(v) for v in values)
    if not out or not all(isfinite(v) for v in out):
        raise UserError(f"{name} must be one or more finite numbers.")
    return out
