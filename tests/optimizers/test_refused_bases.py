"""Bases under which a method would be wrong: those that maximize, or keep the weights in other places too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import elastic_lsopt as lso
from tests.optimizers.small_net import Net, batch, loss_fn

pytestmark = pytest.mark.fast


def schedule_free(ps: Any) -> torch.optim.Optimizer:
    return lso.UpdateOptimizer(ps, "schedule_free", lr=0.1, form="sgd")


class Factors(nn.Module):
    """The factors of one layer by the names that peft gives them."""

    def __init__(self) -> None:
        super().__init__()
        factors = {"lora_A": nn.Linear(4, 2, bias=False), "lora_B": nn.Linear(2, 3, bias=False)}
        self.layer = nn.ModuleDict(factors)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer["lora_B"](self.layer["lora_A"](x))


@pytest.mark.parametrize("method", [lso.WSAM(), lso.NBAR(alpha=0.5)])
@pytest.mark.parametrize("door", ["optimizer", "engine"])
def test_a_method_that_moves_weights_itself_is_refused_over_schedule_free(method: Any, door: str) -> None:
    """What it adds to y alone would never come to z, and so not to x, which is evaluated."""
    model = Factors().double()
    name = "wsam" if isinstance(method, lso.WSAM) else "nbar"
    with pytest.raises(
        lso.UserError, match=f"^{name} moves weights itself, and schedule_free keeps them in other"
    ) as e:
        if door == "optimizer":
            lso.LandscapeOptimizer(schedule_free(model.named_parameters()), method)
        else:
            lso.Engine.of(model, schedule_free(model.named_parameters()), method=method, loss_fn=loss_fn)
    assert "\n" not in str(e.value) and ("decouple" in str(e.value)) == (name == "wsam")


def test_coupled_wsam_is_not_refused_over_schedule_free() -> None:
    """With gamma = 1/2 it is SAM: the same steps."""
    ends = []
    for method in (lso.SAM(rho=0.2), lso.WSAM(rho=0.2, gamma=0.5, decouple=False)):
        model = Net().double()
        engine = lso.Engine.of(model, schedule_free(model.named_parameters()), method=method, loss_fn=loss_fn)
        for _ in range(3):
            engine.train_batch([batch()])
        ends.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in zip(*ends, strict=True))


def rising(ps: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(ps, lr=0.1, maximize=True)


def rising_update(ps: Any) -> torch.optim.Optimizer:
    return lso.UpdateOptimizer(ps, "AdamW", lr=0.1, maximize=True)


@pytest.mark.parametrize("method", [lso.SAM, lso.WSAM, lso.SAMPa, lso.LPFSGD, lso.EntropySGD])
@pytest.mark.parametrize("base", [rising, rising_update])
@pytest.mark.parametrize("door", ["optimizer", "engine"])
def test_a_base_that_maximizes_is_refused(method: Any, base: Any, door: str) -> None:
    """No method turns its way up, and the sign of what it moves itself, for a loss that is to grow."""
    model, says = (
        Net().double(),
        r"^param group 0 has maximize=True, and \w+ is made for a loss that is minimized",
    )
    with pytest.raises(lso.UserError, match=says):
        if door == "optimizer":
            lso.LandscapeOptimizer(base(model.parameters()), method(), total_samples=8)
        else:
            lso.Engine.of(model, base(model.parameters()), method=method(), loss_fn=loss_fn, total_samples=8)


def test_a_group_that_maximizes_is_refused_when_it_is_added_or_changed() -> None:
    w, b = (nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = lso.LandscapeOptimizer(torch.optim.SGD([w], lr=0.1), lso.SAM())

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = sum((p.square().sum() for group in optimizer.param_groups for p in group["params"]), torch.zeros(()))
        loss.backward()
        return loss

    optimizer.step(closure)
    with pytest.raises(lso.UserError, match=r"^a param group has maximize=True, and SAM"):
        optimizer.add_param_group({"params": [b], "maximize": True})
    optimizer.step(closure)
    assert len(optimizer.param_groups) == 1
    optimizer.base.add_param_group({"params": [b], "maximize": True})
    with pytest.raises(lso.UserError, match=r"^param group 1 has maximize=True, and SAM"):
        optimizer.step(closure)
    optimizer.param_groups[1]["maximize"] = False
    optimizer.step(closure)
    before = w.detach().clone()
    optimizer.param_groups[0]["maximize"] = True
    with pytest.raises(lso.UserError, match=r"^param group 0 has maximize=True, and SAM"):
        optimizer.step(closure)
    assert torch.equal(before, w)


def test_without_a_method_a_base_may_maximize_but_not_beside_an_update_that_cannot() -> None:
    """none: w + lr dL/dw. LAMB has no such entry, and would go down where the other group goes up."""
    w, b = (nn.Parameter(torch.full((2, 2), 2.0)) for _ in range(2))
    optimizer = lso.LandscapeOptimizer(torch.optim.SGD([w], lr=0.1, maximize=True), lso.Plain())

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = -w.square().sum() / 2
        loss.backward()
        return loss

    optimizer.step(closure)
    assert torch.allclose(w, torch.full((2, 2), 1.8))
    groups = [{"params": [w], "update": "lamb"}, {"params": [b]}]
    mixed = lso.UpdateOptimizer(groups, "AdamW", lr=0.1, maximize=True)
    with pytest.raises(lso.UserError, match=r"^param group 1 has maximize=True, and the update of group 0, lamb,"):
        lso.LandscapeOptimizer(mixed, lso.Plain())
