"""Principal components against numpy's SVD of whole vectors; a window that thins out keeps what it should."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import elastic_lsopt as lso
from elastic_lsopt.errors import NonFinite, UserError
from elastic_lsopt.probes.trajectory.trajectory_pca import Window, trajectory_pca
from elastic_lsopt.space.geometry import ParameterSpace
from tests.cases.probes.spectra import flat, vector

pytestmark = pytest.mark.fast


def a_space(dtype: torch.dtype = torch.float64) -> ParameterSpace:
    model = nn.Linear(9, 4, dtype=dtype)  # 40 numbers
    return lso.attach(model, lambda m, batch: m(batch).mean(), [torch.ones(1, 9, dtype=dtype)])[0]


@pytest.mark.parametrize("dtype,near", [(torch.float64, 1e-10), (torch.float32, 2e-4)])
def test_against_the_svd_of_whole_vectors(dtype: torch.dtype, near: float) -> None:
    torch.manual_seed(0)
    space = a_space(dtype)
    points = torch.cumsum(torch.randn(7, 40, dtype=torch.float64), 0)
    window = Window(space, 8, "cpu")
    for i, p in enumerate(points):
        window.add(vector(space, p), 10 * i)
    found = trajectory_pca(window, components=3)
    centred = (points - points.mean(0)).numpy()
    u, s, rows = np.linalg.svd(centred, full_matrices=False)
    assert found.explained == pytest.approx((s**2 / (s**2).sum())[:3].tolist(), rel=near)
    assert found.samples == tuple(range(0, 70, 10))
    assert found.resolution < (1e-13 if dtype == torch.float64 else 1e-4)
    coordinates = np.array(found.coordinates)
    for k in range(3):
        sign = np.sign((np.arange(7) ** 2 * u[:, k]).sum())
        np.testing.assert_allclose(coordinates[:, k], sign * u[:, k] * s[k], atol=near * s[0])
        np.testing.assert_allclose(flat(found.directions[k]).double().numpy(), sign * rows[k], atol=near)
    # What the coordinates and directions say is what the points are.
    rebuilt = sum(torch.tensor(coordinates[:, k])[:, None] * flat(found.directions[k]).double() for k in range(3))
    rest = torch.tensor(centred) - rebuilt
    assert float(rest.square().sum()) == pytest.approx(float((s[3:] ** 2).sum()), rel=10 * near)


@pytest.mark.parametrize("length", [3, 5, 6, 7, 8, 23, 100])
@pytest.mark.parametrize("capacity", [3, 5, 6])
def test_a_window_that_thins_out(capacity: int, length: int) -> None:
    """The start, every stride-th point and the newest; linear motion keeps one direction and even coordinates."""
    space = a_space()
    torch.manual_seed(1)
    direction = torch.randn(40, dtype=torch.float64)
    window = Window(space, capacity)
    for i in range(length):
        window.add(vector(space, i * direction), 3 * i)
        assert len(window) <= capacity and window.samples[-1] == 3 * i
    assert window.differences.local_bytes == capacity * 40 * 8
    kept = list(range(0, length, window.stride))
    kept += [length - 1] if kept[-1] != length - 1 else []
    assert window.samples == [3 * i for i in kept] and len(kept) >= min(length, capacity // 2 + 1)
    for i, d in zip(kept, window.differences, strict=True):
        assert torch.equal(flat(d), i * direction)
    found = trajectory_pca(window, components=2)
    assert len(found.directions) == 1 and found.explained == pytest.approx([1.0])  # the second would be rounding
    torch.testing.assert_close(flat(found.directions[0]), direction / direction.norm())
    mean = sum(kept) / len(kept)
    expected = [(i - mean) * float(direction.norm()) for i in kept]
    assert [row[0] for row in found.coordinates] == pytest.approx(expected, abs=1e-9)


def test_a_circle_has_two_equal_components() -> None:
    space = a_space()
    window = Window(space, 12)
    for i in range(12):
        angle = torch.tensor(2 * torch.pi * i / 12, dtype=torch.float64)
        p = torch.zeros(40, dtype=torch.float64)
        p[3], p[30], p[7] = 2 * angle.cos(), 2 * angle.sin(), 100.0
        window.add(vector(space, p), i)
    found = trajectory_pca(window, components=5)
    assert found.explained == pytest.approx([0.5, 0.5])
    assert all(x**2 + y**2 == pytest.approx(4) for x, y in found.coordinates)


def test_bad_input() -> None:
    space = a_space()
    window = Window(space, 4)
    with pytest.raises(UserError, match="has 0 point"):
        trajectory_pca(window)
    for i in range(3):
        window.add(vector(space, torch.ones(40, dtype=torch.float64)), i)
    with pytest.raises(UserError, match="all the same"):
        trajectory_pca(window)
    with pytest.raises(UserError, match="components=0 must be >= 1"):
        trajectory_pca(window, components=0)
    small = Window(space, 3)
    window.add(vector(space, torch.zeros(40, dtype=torch.float64)), 3)
    with pytest.raises(UserError, match="window=3 is smaller than the 4 points"):
        small.load_state_dict(window.state_dict())
    small.add(vector(space, torch.full((40,), torch.nan, dtype=torch.float64)), 0)
    small.add(space.zeros(), 1)
    with pytest.raises(NonFinite, match="inf or NaN"):
        trajectory_pca(small)
