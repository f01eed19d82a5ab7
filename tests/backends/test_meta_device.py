"""A model without values is refused by one line, wherever it comes in."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import elastic_lsopt as lso


def loss(model: nn.Module, batch: Any) -> torch.Tensor:
    return model(batch).sum()


@pytest.mark.parametrize(
    ("face", "frozen"),
    [("attach", False), ("attach", True), ("closure", False), ("initialize", False), ("initialize", True)],
)
def test_a_model_on_the_meta_device_is_refused(face: str, frozen: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 3, device="meta"), nn.Linear(3, 2))
    model[0].requires_grad_(not frozen)
    with pytest.raises(lso.UserError, match=r"parameter (0\.weight|\S+) is on the meta device, which has shapes"):
        if face == "attach":
            lso.attach(model, loss, [torch.zeros(1, 4)])
        elif face == "closure":
            lso.LandscapeOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), lso.SAM(rho=0.1)).step(lambda: 0)
        else:
            lso.initialize(
                model=model, config={"zero_optimization": {"stage": 1}}, method=lso.SAM(rho=0.1), loss_fn=loss,
                base=lambda params: torch.optim.SGD(params, lr=0.1),
            )  # fmt: skip
