"""Filter normalisation against the authors' loop over filters, on whole tensors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import elastic_lsopt as lso
from elastic_lsopt.probes.flatness.filter_normalisation import filter_normalised
from elastic_lsopt.space.geometry import ParameterSpace

pytestmark = pytest.mark.fast


def loop(d: Tensor, w: Tensor) -> Tensor:
    """normalize_direction(norm="filter") and ignore="biasbn" of the authors' net_plotter.py, written out."""
    d = d.clone()
    if d.dim() <= 1:
        return d.fill_(0)
    for i in range(len(d)):
        d[i] *= w[i].norm() / (d[i].norm() + 1e-10)
    return d


def a_space(dtype: torch.dtype) -> tuple[nn.Module, ParameterSpace]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 5, 2), nn.Flatten(), nn.LayerNorm(20), nn.Linear(20, 4)).to(dtype)
    with torch.no_grad():
        model[0].weight[2].zero_()  # type: ignore[index]
    batch = torch.ones(1, 3, 3, 3, dtype=dtype)
    return model, lso.attach(model, lambda m, x: m(x).mean(), [batch])[0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_against_a_loop_over_filters(dtype: torch.dtype) -> None:
    """A convolution, a matrix, biases and gains; a filter of zeros gets no direction."""
    model, space = a_space(dtype)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    direction = space.noise(0, 3).vector()
    kept = direction.clone()
    found = filter_normalised(space, direction)
    for (name, w), raw, got in zip(before.items(), kept.tensors, found.tensors, strict=True):
        torch.testing.assert_close(got.view(w.shape), loop(raw.view(w.shape), w), msg=name)
    assert float(found.tensors[0].view(5, -1)[2].abs().max()) == 0
    assert all(torch.equal(a, b) for a, b in zip(kept.tensors, direction.tensors, strict=True))
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_a_row_without_direction_stays_zero() -> None:
    _, space = a_space(torch.float64)
    found = filter_normalised(space, space.zeros())
    assert all(float(t.abs().max()) == 0 for t in found.tensors)
