"""Paths through landscapes that are known: a double well, a ring, a ramp; exact ends; weights that come back."""

from __future__ import annotations

import copy
from collections.abc import Callable
from math import inf
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import elastic_lsopt as lso
from elastic_lsopt.errors import NonFinite, UserError
from elastic_lsopt.probes.surface.mode_connectivity import mode_connectivity
from elastic_lsopt.space.vector import Vector
from tests.cases import engines
from tests.oracles.paper_loops import cross_entropy

pytestmark = pytest.mark.fast


class Plane(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([0.3, -0.7], dtype=torch.float64))


def landscape(f: Callable[[Tensor, Tensor], Tensor]) -> tuple[Any, Any]:
    return lso.attach(Plane(), lambda m, batch: f(m.w[0], m.w[1]), [torch.ones(1, 1)])


def at(space: Any, x: float, y: float) -> Vector:
    out = space.zeros()
    out.tensors[0].copy_(torch.tensor([x, y], dtype=torch.float64))
    return out


def test_the_barrier_of_a_double_well() -> None:
    """(x^2 - 1)^2 + x / 4 from -1 to 1: over the interpolation of the ends exactly 1, over their mean more."""
    space, oracle = landscape(lambda x, y: (x * x - 1) ** 2 + x / 4 + y * y)
    path = mode_connectivity(space, oracle, start=at(space, -1, 0), end=at(space, 1, 0), points=41)
    for t, loss in zip(path.times, path.losses, strict=True):
        x = 2 * t - 1
        assert loss == pytest.approx((x * x - 1) ** 2 + x / 4, abs=1e-14)
    assert path.barrier == pytest.approx(1.0) and path.barrier_error == pytest.approx(0.0, abs=1e-12)
    fine = torch.linspace(-1, 1, 200_001, dtype=torch.float64)
    top = float(((fine**2 - 1) ** 2 + fine / 4).max())
    assert path.instability == pytest.approx(max(path.losses)) and path.instability <= top < path.instability + 1e-3
    assert path.distance == 2 and path.bend is None and (path.gradients, path.forwards) == (0, 41)
    assert space.weights.tensors[0].tolist() == [0.3, -0.7]


def test_the_top_between_two_points_is_estimated() -> None:
    """x (1 - x) with its top at 1/2 between points at thirds: the parabola is exact."""
    space, oracle = landscape(lambda x, y: x * (1 - x) + y * y)
    path = mode_connectivity(space, oracle, start=at(space, 0, 0), end=at(space, 1, 0), points=4)
    assert path.barrier == pytest.approx(2 / 9) and path.barrier + path.barrier_error == pytest.approx(1 / 4)


def test_a_ramp_has_no_barrier() -> None:
    space, oracle = landscape(lambda x, y: 3 * x + y)
    path = mode_connectivity(space, oracle, start=at(space, 0, 0), end=at(space, 1, 2), points=5)
    assert path.barrier == pytest.approx(0, abs=1e-14) and path.instability == pytest.approx(2.5)


def ring(x: Tensor, y: Tensor) -> Tensor:
    return (x * x + y * y - 1) ** 2


def test_a_curve_goes_round_the_hill() -> None:
    """From (-1, 0) to (1, 0) on a ring the line's barrier is 1. With c = (0, k) and s = t (1 - t) the curve's loss is
    16 s^2 (k^2 s - 1)^2, whose mean is least at k^2 = B(4, 4) / B(5, 5) = 9/2; its top is then 4/81, at s = 1/9."""
    space, oracle = landscape(ring)
    start, end = at(space, -1, 0), at(space, 1, 0)
    assert mode_connectivity(space, oracle, start=start, end=end).barrier == pytest.approx(1.0)
    best = mode_connectivity(
        space, oracle, start=start, end=end, curve="bezier", steps=0, points=201, bend=at(space, 0, 4.5**0.5)
    )
    assert best.barrier == pytest.approx(4 / 81, rel=1e-3)
    path = mode_connectivity(
        space, oracle, start=start, end=end, curve="bezier", steps=200, learning_rate=0.1, bend=at(space, 0, 1)
    )
    assert path.bend is not None
    x, y = path.bend.tensors[0].tolist()
    assert abs(x) < 0.15 and y == pytest.approx(4.5**0.5, rel=0.05)
    assert path.barrier < 0.08 and (path.gradients, path.forwards) == (200, 21)


def test_the_curve_s_steps_are_those_of_a_plain_loop() -> None:
    space, oracle = landscape(lambda x, y: ring(x, y) + 0.3 * y)
    begin = at(space, 0.2, 0.1)
    path = mode_connectivity(
        space, oracle, start=at(space, -1, 0), end=at(space, 1, 0.5),
        curve="bezier", steps=20, learning_rate=0.2, seed=5, bend=begin,
    )  # fmt: skip
    a, b, c = (torch.tensor(p, dtype=torch.float64) for p in ([-1, 0], [1, 0.5], [0.2, 0.1]))
    draw, losses = Random(5), []
    for _ in range(20):
        t = draw.random()
        c.requires_grad_()
        p = (1 - t) ** 2 * a + 2 * t * (1 - t) * c + t**2 * b
        loss = ring(p[0], p[1]) + 0.3 * p[1]
        losses.append(loss.item())
        [g] = torch.autograd.grad(loss, c)
        c = (c - 0.2 * g).detach()
    assert path.bend is not None
    torch.testing.assert_close(path.bend.tensors[0], c, rtol=1e-12, atol=0)
    assert path.training == pytest.approx(losses, rel=1e-12)
    assert begin.tensors[0].tolist() == [0.2, 0.1]
    other = mode_connectivity(
        space, oracle, start=at(space, -1, 0), end=at(space, 1, 0.5), curve="bezier", steps=20, seed=6
    )
    assert other.training[1:] != path.training[1:]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("curve", ["line", "bezier"])
def test_ends_are_exact_and_the_weights_come_back(curve: Any, dtype: torch.dtype) -> None:
    """Bit for bit: the loss at an end is that of a plain model with those weights."""
    model = engines.net(dtype=dtype)
    [[batch]] = engines.batches(1, 1, dtype=dtype)
    space, oracle = lso.attach(model, cross_entropy, [batch])
    before = [p.detach().clone() for p in model.parameters()]
    ends = [engines.net(dtype=dtype, seed=s) for s in (1, 2)]
    vectors = []
    for end in ends:
        v = space.empty()
        for t, p in zip(v.tensors, end.parameters(), strict=True):
            t.copy_(p.detach().flatten())
        vectors.append(v)
    path = mode_connectivity(space, oracle, start=vectors[0], end=vectors[1], curve=curve, points=3, steps=2)
    with torch.no_grad():
        for end, loss in zip(ends, (path.losses[0], path.losses[-1]), strict=True):
            assert cross_entropy(end, batch).item() == loss
        if curve == "line":
            middle = copy.deepcopy(ends[0])
            for p, a, b in zip(middle.parameters(), vectors[0].tensors, vectors[1].tensors, strict=True):
                p.copy_((a * 0.5).add(b, alpha=0.5).view(p.shape))
            assert cross_entropy(middle, batch).item() == path.losses[1]
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), before, strict=True))


def test_losses_that_are_not_finite() -> None:
    """On the way: an infinite barrier. At an end, or in the curve's steps: refused, and the weights need no repair."""
    space, oracle = landscape(lambda x, y: -torch.log(x.abs()) + y)
    path = mode_connectivity(space, oracle, start=at(space, -1, 0), end=at(space, 1, 0), points=3)
    assert path.barrier == inf and path.losses[1] == inf
    hole, there = landscape(lambda x, y: x / x)
    assert mode_connectivity(hole, there, start=at(hole, -1, 0), end=at(hole, 1, 0), points=3).barrier == inf
    with pytest.raises(NonFinite, match="ends of the path are inf and 0"):
        mode_connectivity(space, oracle, start=at(space, 0, 0), end=at(space, 1, 0))
    with pytest.raises(NonFinite, match="pass 1"):
        mode_connectivity(space, oracle, start=at(space, 0, 0), end=at(space, 0, 1), curve="bezier")
    assert space.in_sync and space.weights.tensors[0].tolist() == [0.3, -0.7]


def test_bad_input() -> None:
    space, oracle = landscape(lambda x, y: x + y)
    a, b = at(space, 0, 0), at(space, 1, 0)
    for settings, said in (
        ({"points": 1}, "points=1 must be >= 2"),
        ({"curve": "arc"}, "curve='arc' is unknown"),
        ({"steps": -1}, "steps=-1 must be >= 0"),
        ({"learning_rate": 0.0}, "learning_rate=0.0 must be"),
    ):
        with pytest.raises(UserError, match=said):
            mode_connectivity(space, oracle, start=a, end=b, **settings)  # type: ignore[arg-type]
