"""Copies of a model with its optimizer, by `copy.deepcopy` and by pickle."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import elastic_lsopt as lso
from elastic_lsopt.averages.ema import EMA


def pickled(both: Any) -> Any:
    return pickle.loads(pickle.dumps(both))  # of this very test


@pytest.mark.fast
@pytest.mark.parametrize("way", [copy.deepcopy, pickled])
@pytest.mark.parametrize("base", ["torch", "AdamW", "lamb", "muon"])
def test_a_copy_of_model_and_optimizer_goes_on_as_they_do(base: str, way: Callable[[Any], Any]) -> None:
    """As torch's do: before the first step, after some, and with a schedule that has wrapped `step`."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3, bias=False), nn.Linear(3, 2, bias=False))
    named: Any = list(model.named_parameters())
    made = torch.optim.Adam(named, lr=0.01) if base == "torch" else lso.UpdateOptimizer(named, base, lr=0.01)
    optimizer = lso.LandscapeOptimizer(made, lso.LookSAM(k=2), keep=[EMA(decay=0.5)], max_grad_norm=1.0)
    torch.optim.lr_scheduler.StepLR(optimizer, 100)

    def go(net: nn.Module, own: Any) -> None:
        def closure() -> Tensor:
            own.zero_grad()
            loss = (net(torch.eye(4)) - 1).square().mean()
            loss.backward()
            return loss

        own.step(closure)

    early, its = way((model, optimizer))
    for _ in range(3):
        go(model, optimizer)
        go(early, its)
    late, other = way((model, optimizer))
    for _ in range(3):
        before = [p.detach().clone() for p in model.parameters()]
        go(late, other)
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
        go(model, optimizer)
        go(early, its)
    for net, own in ((late, other), (early, its)):
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), net.parameters(), strict=True))
        assert own.clock == optimizer.clock and own.last_step == optimizer.last_step
        assert all(torch.equal(a, b) for a, b in zip(own.average().tensors, optimizer.average().tensors, strict=True))
        assert own.param_groups is own.base.param_groups and own.param_groups[0]["params"][0] is net[0].weight
        assert own._optimizer_step_pre_hooks is own.base._optimizer_step_pre_hooks
