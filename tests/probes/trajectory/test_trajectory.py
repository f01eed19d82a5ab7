"""Trajectories against closed forms: straight lines, circles, and the same numbers at any world size."""

from __future__ import annotations

from math import cos, inf, isnan, pi, sin

import pytest
import torch
from torch import Tensor, nn

import elastic_lsopt as lso
from elastic_lsopt.errors import NonFinite, UserError
from elastic_lsopt.oracle.clock import SampleClock
from elastic_lsopt.probes.trajectory.trajectory import Trajectory, alignment
from elastic_lsopt.space.basis import Basis
from elastic_lsopt.space.geometry import ParameterSpace
from elastic_lsopt.space.vector import Vector

pytestmark = pytest.mark.fast


class Point(nn.Module):
    """A matrix of 2 x 3 and a vector of 2."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.zeros(2, 3, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(2, dtype=dtype))

    def put(self, values: list[float] | Tensor) -> None:
        with torch.no_grad():
            nn.utils.vector_to_parameters(torch.as_tensor(values, dtype=self.bias.dtype), self.parameters())


def space_at(values: list[float], dtype: torch.dtype = torch.float64) -> tuple[Point, ParameterSpace]:
    model = Point(dtype)
    model.put(values)
    space, _ = lso.attach(model, lambda m, batch: m.bias.sum() * 0 + batch.mean(), [torch.ones(1, 1)])
    return model, space


@pytest.mark.parametrize("dtype,near", [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_a_straight_line_has_no_angle(dtype: torch.dtype, near: float) -> None:
    """In fp32 acos of the cosine would be out by 3e-4."""
    direction = torch.tensor([1.0, 2, -1, 0.5, 0, 3, -2, 1], dtype=dtype)
    model, space = space_at([1.0] * 8, dtype)
    trajectory = Trajectory(space)
    length = float(direction.norm())
    steps = [2.0, 3.0, 5.0, 9.0]
    for t in range(1, 4):
        model.put(1 + steps[t] * direction)
        if t == 1:
            first = trajectory.observe(10 * t)
            assert isnan(first.cosine) and isnan(first.angle) and isnan(first.angular_velocity)
            continue
        seen = trajectory.observe(10 * t)
        assert seen.angle < near and seen.cosine == pytest.approx(1, abs=near)
        assert seen.angular_velocity < near
        assert seen.update_norm == pytest.approx(length * (steps[t] - steps[t - 1]), rel=near)
        assert seen.path_length == pytest.approx(length * steps[t], rel=near)
        assert seen.distance_from_start == seen.distance_from_mark == pytest.approx(length * steps[t], rel=near)


def test_a_turn_back_is_half_a_turn() -> None:
    model, space = space_at([0.0] * 8)
    trajectory = Trajectory(space)
    seen = None
    for t, x in enumerate((1.0, 0.25), 1):
        model.put([x, 2 * x] * 4)
        seen = trajectory.observe(t)
    assert seen and seen.angle == pytest.approx(pi, abs=1e-12) and seen.cosine == pytest.approx(-1, abs=1e-12)
    assert seen.path_length == pytest.approx(1.75 * 20**0.5) and seen.distance_from_start == pytest.approx(
        0.25 * 20**0.5
    )


def test_a_circle_has_a_constant_angular_velocity() -> None:
    """Radius 2, 0.01 radians a sample, observed at uneven times; the chord over phi is 2 r sin(phi / 2)."""
    omega, radius = 0.01, 2.0
    times = [0, 10, 25, 30, 60, 61]

    def at(samples: int) -> list[float]:
        return [radius * cos(omega * samples), 0, 0, 0, 0, 0, radius * sin(omega * samples), 0]

    model, space = space_at(at(0))
    trajectory = Trajectory(space)
    path = 0.0
    for i, samples in enumerate(times[1:], 1):
        model.put(at(samples))
        seen = trajectory.observe(SampleClock(samples=samples, steps=i))
        chord = 2 * radius * sin(omega * (samples - times[i - 1]) / 2)
        path += chord
        assert seen.update_norm == pytest.approx(chord, rel=1e-12)
        assert seen.path_length == pytest.approx(path, rel=1e-12)
        assert seen.distance_from_start == pytest.approx(2 * radius * sin(omega * samples / 2), rel=1e-12)
        if i > 1:
            turn = omega * (samples - times[i - 2]) / 2
            assert seen.angle == pytest.approx(turn, rel=1e-10) and seen.cosine == pytest.approx(cos(turn), rel=1e-12)
            assert seen.angular_velocity == pytest.approx(omega, rel=1e-10)


def test_distance_from_a_mark_and_a_step_without_a_move() -> None:
    model, space = space_at([0.0] * 8)
    trajectory = Trajectory(space)
    model.put([1.0, 0, 0, 0, 0, 0, 0, 0])
    assert trajectory.observe(4).distance_from_mark == 1
    trajectory.mark()
    still = trajectory.observe(8)
    assert (still.update_norm, still.path_length, still.distance_from_mark) == (0, 1, 0)
    assert isnan(still.angle)
    model.put([1.0, 2, 0, 0, 0, 0, 0, 0])
    seen = trajectory.observe(12)
    assert seen.distance_from_mark == 2 and seen.distance_from_start == pytest.approx(5**0.5)
    assert seen.angle == pytest.approx(pi / 2) and seen.angular_velocity == pytest.approx(pi / 2 / 8)


def test_update_to_weight_ratio() -> None:
    model, space = space_at([3.0, 4, 0, 0, 0, 0, 0, 0])
    trajectory = Trajectory(space)
    model.put([3.0, 4, 0, 0, 1, 0, 0, 0])
    assert trajectory.observe(1).update_to_weight == {"matrix": pytest.approx(0.2), "bias": 0.0}
    model.put([3.0, 4, 0, 0, 1, 0, 0, 1])
    assert trajectory.observe(2).update_to_weight == {"matrix": 0.0, "bias": inf}


@pytest.mark.parametrize("as_basis", [False, True])
def test_alignment(as_basis: bool) -> None:
    """Against a projection by least squares on plain tensors, with vectors that are not orthogonal."""
    torch.manual_seed(0)
    model, space = space_at([0.0] * 8)
    rows = torch.randn(3, 8, dtype=torch.float64)
    vectors = Basis(space, 3)
    for row in rows:
        model.put(row)
        vectors.append(space.weights)
    u, g = torch.randn(8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    model.put(g)
    gradient = space.weights.clone()
    model.put([0.0] * 8)
    trajectory = Trajectory(space)
    model.put(u)
    seen = trajectory.observe(1, gradient=gradient, eigenvectors=vectors if as_basis else list(vectors))
    for x, found in ((u, seen.update_alignment), (g, seen.gradient_alignment)):
        assert found
        inside = rows.T @ torch.linalg.lstsq(rows.T, x[:, None]).solution
        assert found.share == pytest.approx(float(inside.square().sum() / x.square().sum()), rel=1e-10)
        assert found.cosines == pytest.approx(torch.cosine_similarity(rows, x[None]).tolist(), rel=1e-10)


def test_it_goes_on_from_a_saved_state() -> None:
    torch.manual_seed(0)
    points = torch.randn(9, 8, dtype=torch.float64)
    model, space = space_at([0.0] * 8)
    first = Trajectory(space, window=4)
    model.put([1.0] * 8)
    second = Trajectory(space, window=4)  # begun elsewhere
    for t, p in enumerate(points, 1):
        model.put(p)
        if t == 3:
            first.mark()
        seen = first.observe(t)
        if t == 5:
            second.load_state_dict(first.state_dict())
        if t > 5:
            assert second.observe(t) == seen
    one, other = first.state_dict(), second.state_dict()
    assert one.keys() == other.keys() and "window.difference.2" in one
    for key, value in one.items():
        if isinstance(value, Vector):
            assert space.norm(value - other[key]) == 0, key  # type: ignore[operator]
        else:
            assert value == other[key], key


def test_bad_input() -> None:
    model, space = space_at([0.0] * 8)
    trajectory = Trajectory(space, samples=5)
    with pytest.raises(UserError, match="samples=5 must be > 5"):
        trajectory.observe(5)
    model.put([inf, *[0.0] * 7])
    with pytest.raises(NonFinite, match="length inf"):
        trajectory.observe(6)
    model.put([1.0] * 8)
    assert trajectory.observe(6).update_norm == pytest.approx(8**0.5)
    v = space.weights.clone()
    with pytest.raises(UserError, match="not independent"):
        alignment(space, v, [v, v * 2])
    with pytest.raises(UserError, match="empty"):
        alignment(space, v, [])
    with pytest.raises(UserError, match="window=2 must be >= 3"):
        Trajectory(space, window=2)
