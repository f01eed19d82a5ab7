"""Vector arithmetic equals that of plain tensors and changes nothing else; scales and the cut into rows as well."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from elastic_lsopt.backends.replicated import Replicated
from elastic_lsopt.space.geometry import ParameterSpace
from elastic_lsopt.space.layout import RowSpan, row_spans
from elastic_lsopt.space.vector import Scales, Vector

pytestmark = pytest.mark.fast


def space_of(dtype: torch.dtype = torch.float32) -> ParameterSpace:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5)).to(dtype)
    return ParameterSpace(Replicated(model.named_parameters(), None, model=model))


def two(space: ParameterSpace) -> tuple[Vector, Vector, list[Tensor], list[Tensor]]:
    """Two vectors, and plain copies of their pieces."""
    a, b = space.noise(0).vector(), space.noise(1).vector()
    return a, b, [t.clone() for t in a.tensors], [t.clone() for t in b.tensors]


def same(v: Vector, plain: list[Tensor]) -> bool:
    return all(torch.allclose(x, y, rtol=1e-6, atol=1e-7) for x, y in zip(v.tensors, plain, strict=True))


PURE: list[tuple[str, Callable[[Vector, Vector], Vector], Callable[[Tensor, Tensor], Tensor]]] = [
    ("a + b", lambda a, b: a + b, lambda x, y: x + y),
    ("a - b", lambda a, b: a - b, lambda x, y: x - y),
    ("a * b", lambda a, b: a * b, lambda x, y: x * y),
    ("a * 2", lambda a, b: a * 2.0, lambda x, y: x * 2),
    ("3 a", lambda a, b: 3.0 * a, lambda x, y: 3 * x),
    ("-a", lambda a, b: -a, lambda x, y: -x),
    ("clone", lambda a, b: a.clone(), lambda x, y: x),
]
IN_PLACE: list[tuple[str, Callable[[Vector, Vector], Vector], Callable[[Tensor, Tensor], Tensor]]] = [
    ("add_ vector", lambda a, b: a.add_(b, alpha=-0.5), lambda x, y: x - 0.5 * y),
    ("add_ number", lambda a, b: a.add_(2.0, alpha=3.0), lambda x, y: x + 6.0),
    ("mul_ vector", lambda a, b: a.mul_(b), lambda x, y: x * y),
    ("mul_ number", lambda a, b: a.mul_(0.25), lambda x, y: x * 0.25),
    ("abs_", lambda a, b: a.abs_(), lambda x, y: x.abs()),
    ("copy_", lambda a, b: a.copy_(b), lambda x, y: y),
    ("zero_", lambda a, b: a.zero_(), lambda x, y: torch.zeros_like(x)),
]


@pytest.mark.parametrize("name,ours,plain", PURE, ids=[c[0] for c in PURE])
def test_pure(name: str, ours: Callable[..., Vector], plain: Callable[..., Tensor]) -> None:
    a, b, pa, pb = two(space_of())
    assert same(ours(a, b), [plain(x, y) for x, y in zip(pa, pb, strict=True)])
    assert same(a, pa) and same(b, pb), "an operand changed"


@pytest.mark.parametrize("name,ours,plain", IN_PLACE, ids=[c[0] for c in IN_PLACE])
def test_in_place(name: str, ours: Callable[..., Vector], plain: Callable[..., Tensor]) -> None:
    a, b, pa, pb = two(space_of())
    assert ours(a, b) is a
    assert same(a, [plain(x, y) for x, y in zip(pa, pb, strict=True)])
    assert same(b, pb), "the other operand changed"


@pytest.mark.parametrize("dtype,kept", [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
def test_precision_is_fp32_or_that_of_the_weights(dtype: torch.dtype, kept: torch.dtype) -> None:
    space = space_of(dtype)
    assert all(t.dtype == kept for t in space.weights.clone().tensors)
    assert space.zeros().local_bytes == (3 * 5 + 5 + 5 + 5) * kept.itemsize


def test_the_weights_are_live() -> None:
    space = space_of()
    weights = space.weights
    before = weights.clone()
    with space.perturbed(space.noise(0), 0.5):
        moved = weights - before
    assert same(moved, [0.5 * t for t in space.noise(0).vector().tensors])
    assert all(torch.equal(x, y) for x, y in zip(weights.tensors, before.tensors, strict=True))


def test_scales() -> None:
    values = torch.tensor([1.0, 4.0], dtype=torch.float64)
    scales = Scales(values, "row")
    for ours, plain in (
        (scales + 1.0, [2.0, 5.0]),
        (2.0 * scales, [2.0, 8.0]),
        (scales * 2.0, [2.0, 8.0]),
        (3.0 / (scales + 1.0), [1.5, 0.6]),
    ):
        assert ours.per == "row" and ours.values.tolist() == pytest.approx(plain, rel=1e-15)
    assert values.tolist() == [1.0, 4.0]


@pytest.mark.parametrize("row_length", [1, 3, 7, 100])
@pytest.mark.parametrize("offset,length", [(0, 0), (0, 21), (2, 1), (2, 5), (2, 19), (20, 1), (6, 15)])
def test_row_spans_are_a_plain_loop(offset: int, length: int, row_length: int) -> None:
    """Each element falls into one span, and there into the row that it has in the whole parameter."""
    found = {}
    for span in row_spans(offset, length, row_length):
        assert isinstance(span, RowSpan) and (span.end - span.begin) % span.rows == 0
        each = (span.end - span.begin) // span.rows
        for e in range(span.begin, span.end):
            found[e] = span.first + (e - span.begin) // each
    assert found == {e: (offset + e) // row_length for e in range(length)}
