"""What is said to be relative is so: a loss that is a thousand times as large changes no relative error."""

from __future__ import annotations

import math

import pytest
import torch

import elastic_lsopt as lso
from elastic_lsopt.oracle.curvature.curvature_checks import _apart
from elastic_lsopt.oracle.curvature.differences import Differences
from elastic_lsopt.space.geometry import ParameterSpace
from elastic_lsopt.space.vector import Vector

pytestmark = pytest.mark.fast


def space_of_a_layer() -> ParameterSpace:
    torch.manual_seed(0)
    batch = (torch.randn(4, 5), torch.randint(0, 3, (4,)))
    space, _ = lso.attach(
        torch.nn.Linear(5, 3), lambda m, b: torch.nn.functional.cross_entropy(m(b[0]), b[1]), [batch], checked=False
    )
    return space


def test_the_error_of_a_product_by_differences() -> None:
    """A difference that no length makes exact: H v = k v, and up to a hundredth of it beside."""
    space, errors = space_of_a_layer(), []
    v = space.weights.clone()
    for k in (1.0, 1000.0):

        def difference(v: Vector, h: float, k: float = k) -> Vector:
            return v * (k * (1 + 0.01 * math.sin(1 / h)))

        product = Differences(space, difference).product(v)
        errors.append(product.relative_error)
    assert errors[0] and errors[1] == pytest.approx(errors[0], rel=1e-3)


def test_how_far_two_gradients_are_apart() -> None:
    space = space_of_a_layer()
    for scale in (1.0, 1000.0):
        b = space.weights * scale
        assert _apart(b * 1.25, b, space.norm(b)) == pytest.approx(0.25, rel=1e-5)
    assert _apart(b, space.zeros(), 0.0) == pytest.approx(space.norm(b))
