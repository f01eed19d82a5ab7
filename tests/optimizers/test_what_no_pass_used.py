"""Parameters that no pass of a step has used, or only an earlier one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import elastic_lsopt as lso

pytestmark = pytest.mark.fast


@dataclass(frozen=True, kw_only=True)
class Drifting:
    """A method of a user's: the gradient and a constant, written into the borrowed gradient or a Vector of its own."""

    borrowed: bool
    parts = 1

    def init(self, space: Any) -> dict[str, Any]:
        return {}

    def gradient(self, space: Any, oracle: Any, state: Any) -> Any:
        g = oracle.gradient()
        one = space.zeros()
        for t in one.tensors:
            t.fill_(1.0)
        return (g if self.borrowed else g.clone()).add_(one)


@pytest.mark.parametrize("base", ["torch", "ours"])
@pytest.mark.parametrize(
    "method", [lso.LookSAM(k=2, rho=0.5), Drifting(borrowed=True), Drifting(borrowed=False), lso.EntropySGD(noise=1.0)]
)
def test_a_parameter_that_no_pass_of_the_step_used_is_left_alone(base: str, method: Any) -> None:
    """By both kinds of base, and the norm is that of what moved."""
    a, b = nn.Parameter(torch.tensor([1.0, 2.0])), nn.Parameter(torch.tensor([3.0, 1.0]))
    sgd = torch.optim.SGD([a, b], lr=0.1) if base == "torch" else lso.UpdateOptimizer([a, b], "SGD", lr=0.1)
    optimizer, both = lso.LandscapeOptimizer(sgd, method), [True]

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (a**4).sum() * 0.01
        if both[0]:
            loss = loss + (b**4).sum() * 0.01
        loss.backward()
        return loss

    closures = [closure] * method.parts
    optimizer.step(closures)
    before, both[0] = (a.detach().clone(), b.detach().clone()), False
    optimizer.step(closures)
    assert optimizer.last_step is not None and torch.equal(b, before[1])
    assert math.isclose(optimizer.last_step.gradient_norm, float((a - before[0]).norm()) / 0.1, rel_tol=1e-4)


@pytest.mark.parametrize("base", ["torch", "ours"])
@pytest.mark.parametrize("borrowed", [True, False])
def test_what_only_an_earlier_pass_of_the_step_used_moves(base: str, borrowed: bool) -> None:
    """A method in two parts, each of which uses another parameter: the sum is stepped with, wherever it is written."""

    @dataclass(frozen=True, kw_only=True)
    class Summed:
        parts = 2

        def init(self, space: Any) -> dict[str, Any]:
            return {}

        def gradient(self, space: Any, oracle: Any, state: Any) -> Any:
            first, second = oracle.parts(2)
            g = oracle.gradient(first).clone()
            return oracle.gradient(second).add_(g) if borrowed else g.add_(oracle.gradient(second))

    ps = [nn.Parameter(torch.tensor([1.0, 2.0])), nn.Parameter(torch.tensor([3.0, 1.0]))]
    sgd = torch.optim.SGD(ps, lr=0.1) if base == "torch" else lso.UpdateOptimizer(ps, "SGD", lr=0.1)
    optimizer = lso.LandscapeOptimizer(sgd, Summed())

    def closure(p: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = (p**2).sum() / 2
        loss.backward()
        return loss

    optimizer.step([lambda p=p: closure(p) for p in ps])
    for p, was in zip(ps, ([1.0, 2.0], [3.0, 1.0]), strict=True):
        assert torch.allclose(p, 0.9 * torch.tensor(was))
    assert optimizer.last_step is not None
    assert math.isclose(optimizer.last_step.gradient_norm, math.sqrt(15), rel_tol=1e-6)
