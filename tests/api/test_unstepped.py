"""Parameters that are to be trained and are not the base optimizer's: refused, or a method would move them alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import elastic_lsopt as lso

pytestmark = pytest.mark.fast


def sgd(given: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(given, lr=0.1)


def muon(given: Any) -> torch.optim.Optimizer:
    return lso.UpdateOptimizer(given, "muon", lr=0.1)


@pytest.mark.parametrize("base", [sgd, muon])
def test_a_parameter_that_the_optimizer_does_not_have(base: Any) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    matrices = [p for p in model.parameters() if p.ndim == 2]
    with pytest.raises(lso.UserError, match=r"^0\.bias is to be trained \(requires_grad\) .* are 2 parameters in all"):
        lso.Engine.of(model, base(matrices), loss_fn=lambda m, x: m(x).sum())
    for p in model.parameters():
        p.requires_grad_(p.ndim == 2)
    engine = lso.Engine.of(model, base(matrices), method=lso.SAM(rho=0.1), loss_fn=lambda m, x: m(x).square().sum())
    before = [p.detach().clone() for p in model.parameters()]
    engine.train_batch([torch.ones(2, 3)])
    assert [torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)] == [False, True] * 2
