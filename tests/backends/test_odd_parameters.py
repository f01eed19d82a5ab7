"""Parameters whose memory or numbers no vector can be a view of: refused in one line; empty ones: right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import elastic_lsopt as lso

pytestmark = pytest.mark.fast


def stepping(
    ps: Any, loss: Callable[[], Tensor], method: Any, base: Any = None
) -> tuple[lso.LandscapeOptimizer, Callable[[], Any]]:
    """An optimizer and its step."""
    named = list(ps)
    optimizer = lso.LandscapeOptimizer(base or torch.optim.SGD(named, lr=0.1), method, total_samples=10)

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    closures: Any = [closure] * method.parts if method.parts > 1 else closure
    return optimizer, lambda: optimizer.step(closures)


METHODS = [lso.SAM(), lso.LPFSGD(parts=1, gamma=0.1, alpha=1.0), lso.Plain()]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("first", [True, False])
def test_channels_last_is_refused_before_and_after_a_step_and_the_fix_works(method: Any, first: bool) -> None:
    model, x = nn.Conv2d(3, 4, 3), torch.ones(1, 3, 5, 5)
    _, step = stepping(model.named_parameters(), lambda: model(x).square().sum(), method)
    if not first:
        step()
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    before = model.weight.detach().clone()
    with pytest.raises(lso.UserError) as said:
        step()
    assert str(said.value) == (
        "parameter weight is not contiguous (strides (27, 1, 9, 3)); call "
        "model.to(memory_format=torch.contiguous_format) before it is trained, and leave channels_last to the inputs."
    )
    assert torch.equal(model.weight, before)
    model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    step()
    assert not torch.equal(model.weight, before)


def test_a_transposed_matrix_is_refused_with_the_fix_that_works_there() -> None:
    w = nn.Parameter(torch.ones(3, 2).T)
    _, step = stepping([("w", w)], lambda: w.square().sum(), lso.SAM())
    with pytest.raises(
        lso.UserError, match=r"^parameter w is not contiguous .*Parameter\(p.detach\(\).contiguous\(\)\)"
    ):
        step()
    whole = nn.Parameter(w.detach().contiguous())
    _, step = stepping([("w", whole)], lambda: whole.square().sum(), lso.SAM())
    step()
    assert not torch.equal(whole, w)


def test_a_sparse_gradient_is_refused() -> None:
    model = nn.Embedding(5, 2, sparse=True)
    _, step = stepping(model.named_parameters(), lambda: model(torch.tensor([1, 2])).square().sum(), lso.SAM())
    with pytest.raises(lso.UserError) as said:
        step()
    assert str(said.value) == (
        "parameter weight has a sparse gradient, which is no part of one vector; build the embedding with sparse=False."
    )


@pytest.mark.parametrize("method", METHODS)
def test_a_complex_parameter_is_refused(method: Any) -> None:
    w = nn.Parameter(torch.tensor([1 + 2j, 3 - 1j]))
    _, step = stepping([("w", w)], lambda: w.abs().square().sum() / 2, method)
    with pytest.raises(lso.UserError) as said:
        step()
    assert str(said.value) == (
        "parameter w is complex (torch.complex64), and lengths and noise here are of real numbers; train "
        "torch.view_as_real(w), and make it complex in the forward by torch.view_as_complex."
    )


@pytest.mark.parametrize("shape", [(3, 0), (0, 3)])
@pytest.mark.parametrize("scale", ["original", "match_rms_adamw"])
def test_muon_on_an_empty_matrix(shape: tuple[int, int], scale: str) -> None:
    torch.manual_seed(0)
    ends = []
    for empty in (True, False):
        torch.manual_seed(0)
        ps = [("a", nn.Parameter(torch.randn(3, 2))), *([("b", nn.Parameter(torch.randn(shape)))] * empty)]
        base = lso.UpdateOptimizer(ps, "muon", lr=0.1, scale=scale)
        _, step = stepping(ps, lambda ps=ps: sum((p.square().sum() for _, p in ps), torch.zeros(())), lso.SAM(), base)
        step()
        ends.append(ps[0][1].detach().clone())
    assert torch.equal(*ends)


@pytest.mark.parametrize(
    "method", [lso.LPFSGD(parts=1, gamma=0.1, alpha=1.0), lso.RWP(gamma=0.1), lso.SAM(radius="row"), lso.RandomSAM()]
)
def test_methods_of_rows_on_an_empty_matrix(method: Any) -> None:
    """The empty parameter changes nothing about the others."""
    ends = []
    for shape in ((3, 0), (0, 3), None):
        torch.manual_seed(0)
        ps = [("a", nn.Parameter(torch.randn(3, 2)))]
        if shape is not None:
            ps.append(("b", nn.Parameter(torch.empty(shape))))
        _, step = stepping(ps, lambda ps=ps: sum((p.pow(4).sum() for _, p in ps), torch.zeros(())), method)
        step()
        ends.append(ps[0][1].detach().clone())
    assert torch.equal(ends[0], ends[2]) and torch.equal(ends[1], ends[2])
