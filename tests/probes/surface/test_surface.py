"""Slices of quadratics are parabolas; every grid point is perturbed from the weights themselves; they come back."""

from __future__ import annotations

import copy
from math import isnan

import pytest
import torch
from torch import nn

import elastic_lsopt as lso
from elastic_lsopt.errors import NonFinite, UserError
from elastic_lsopt.oracle.microbatch_oracle import MicroBatchOracle
from elastic_lsopt.probes.flatness.filter_normalisation import filter_normalised
from elastic_lsopt.probes.surface.surface import project, random_direction, surface
from elastic_lsopt.space.basis import Basis
from elastic_lsopt.space.geometry import ParameterSpace
from elastic_lsopt.space.vector import Vector
from tests.cases import engines
from tests.oracles.paper_loops import cross_entropy

pytestmark = pytest.mark.fast
CURVATURES = torch.tensor([5.0, 3, 1, 0.5, 0, -2], dtype=torch.float64)


class Bowl(nn.Module):
    """0.5 sum h_i (w_i - 1)^2, a matrix of 2 x 3."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([[2.0, 1, 0], [1, 3, 1]], dtype=torch.float64))

    def forward(self) -> torch.Tensor:
        return 0.5 * (CURVATURES * (self.w.flatten() - 1).square()).sum()


def bowl() -> tuple[ParameterSpace, MicroBatchOracle]:
    return lso.attach(Bowl(), lambda m, batch: m(), [torch.ones(1, 1)])


def along(space: ParameterSpace, *values: float) -> Vector:
    out = space.zeros()
    out.tensors[0].copy_(torch.tensor(values, dtype=torch.float64))
    return out


def test_a_line_on_a_quadratic_is_a_parabola() -> None:
    """Along an eigenvector: L + a g_i + a^2 h_i / 2."""
    space, oracle = bowl()
    alphas = (-2.0, -0.5, 0.0, 1.0, 3.0)
    found = surface(
        space, oracle, along=[along(space, 1, 0, 0, 0, 0, 0)], dimensions=1, alphas=alphas, kind="eigenvector"
    )
    assert found.centre == 3.0  # 0.5 (5 + 0 + 1)
    assert found.losses == (tuple(pytest.approx(3.0 + 5 * a + 2.5 * a * a) for a in alphas),)
    assert (found.alphas, found.betas, found.kind, found.forwards) == (alphas, (0.0,), "eigenvector", 6)


@pytest.mark.parametrize("as_basis", [False, True])
def test_a_plane_on_a_quadratic(as_basis: bool) -> None:
    space, oracle = bowl()
    d1, d2 = along(space, 1, 0, 0, 1, 0, 0), along(space, 0, 0, 1, 0, 0, 1)
    directions = Basis(space, 3)
    for d in (d1, d2):
        directions.append(d)
    alphas, betas = (-1.0, 0.0, 2.0), (0.5, 4.0)
    found = surface(space, oracle, along=directions if as_basis else [d1, d2], alphas=alphas, betas=betas)
    for j, b in enumerate(betas):
        for i, a in enumerate(alphas):
            # w - 1 = (1 + a, 0, -1 + b, a, 2, b)
            expected = 0.5 * (5 * (1 + a) ** 2 + (b - 1) ** 2 + 0.5 * a**2 - 2 * b**2)
            assert found.losses[j][i] == pytest.approx(expected, rel=1e-14)
    assert found.kind == "given" and found.forwards == 7


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_each_point_is_exact(dtype: torch.dtype) -> None:
    """Bit for bit the loss of a plain model set there, whatever was visited before; the weights are the old ones."""
    model = engines.net(dtype=dtype)
    plain = copy.deepcopy(model)
    [[batch]] = engines.batches(1, 1, dtype=dtype)
    space, oracle = lso.attach(model, cross_entropy, [batch])
    before = [p.detach().clone() for p in model.parameters()]
    d1, d2 = random_direction(space, 0), random_direction(space, 1)
    values = (-1.0, -0.3, 0.7)
    found = surface(space, oracle, alphas=values)
    assert found.kind == "random" and found.betas == values
    for j, b in enumerate(values):
        for i, a in enumerate(values):
            with torch.no_grad():
                for p, w, x, y in zip(plain.parameters(), before, d1.tensors, d2.tensors, strict=True):
                    p.copy_(w + (x * a).add(y, alpha=b).view(w.shape))
                assert cross_entropy(plain, batch).item() == found.losses[j][i]
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), before, strict=True))
    backwards = surface(space, oracle, alphas=values[::-1])
    assert backwards.losses == tuple(row[::-1] for row in found.losses[::-1])


def test_random_directions() -> None:
    """As long as the weight matrices, nearly orthogonal, others for another draw."""
    [[batch]] = engines.batches(1, 1, dtype=torch.float64)
    space, oracle = lso.attach(engines.net(dtype=torch.float64), cross_entropy, [batch])
    first, second = random_direction(space, 0), random_direction(space, 1)
    own = filter_normalised(space, space.weights)
    assert space.norm(first) == pytest.approx(space.norm(own), rel=1e-8)
    assert abs(space.dot(first, second)) < 0.3 * space.norm(first) ** 2
    line = surface(space, oracle, dimensions=1, alphas=(1.0,), draw=1)
    with space.perturbed(second):
        assert oracle.loss() == line.losses[0][0]
    plane = surface(space, oracle, alphas=(1.0,), betas=(0.0,), draw=1)
    assert plane.losses[0][0] not in (surface(space, oracle, alphas=(1.0,), betas=(0.0,)).losses[0][0], plane.centre)


def test_projection() -> None:
    """Onto directions that are not orthogonal: least squares, with the distance from the plane."""
    space, _ = bowl()
    d1, d2 = along(space, 1, 0, 0, 0, 0, 0), along(space, 1, 2, 0, 0, 0, 0)
    points = [along(space, 2, 1, 0, 1, 3, 1), along(space, 2 + 3 + 0.5, 1 + 1, 0, 1, 3 + 4, 1 + 3)]
    found = project(space, points, [d1, d2])
    assert found.coordinates == (pytest.approx((0, 0)), pytest.approx((3, 0.5)))
    assert found.distances == pytest.approx((0, 5))
    line = project(space, points, [d2], dimensions=1, origin=points[1])
    assert line.coordinates == (pytest.approx([(-3.5 - 2) / 5]), pytest.approx([0.0]))
    with pytest.raises(UserError, match="parallel or zero"):
        project(space, points, [d1, d1 * 2])


def test_infinite_losses_are_told_and_an_infinite_centre_refused() -> None:
    space, oracle = bowl()
    d = along(space, 1, 0, 0, 0, 0, 1)
    far = surface(space, oracle, along=[d], dimensions=1, alphas=(0.0, 1e200))
    assert far.losses[0][0] == far.centre and isnan(far.losses[0][1])  # inf - inf
    with space.perturbed(d, 1e200), pytest.raises(NonFinite, match="centre of the surface"):
        surface(space, oracle, along=[d], dimensions=1)


def test_bad_input() -> None:
    space, oracle = bowl()
    d = along(space, 1, 0, 0, 0, 0, 0)
    with pytest.raises(UserError, match="along holds 1 direction"):
        surface(space, oracle, along=[d])
    with pytest.raises(UserError, match="dimensions=3 must be 1 or 2"):
        surface(space, oracle, dimensions=3)
    with pytest.raises(UserError, match="betas must be one or more finite"):
        surface(space, oracle, betas=())
    with pytest.raises(UserError, match="alphas must be one or more finite"):
        surface(space, oracle, alphas=(float("nan"),))
    with pytest.raises(UserError, match="'eigen' is unknown"):
        surface(space, oracle, along="eigen")  # type: ignore[arg-type]
