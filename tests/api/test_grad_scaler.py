"""GradScaler is refused in one line at the first step, in whatever way it calls: its scale cannot serve two passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import elastic_lsopt as lso

FP16 = "fp16 needs loss scaling (GradScaler), which is refused: one scale cannot serve two passes"


def problem(dtype: torch.dtype) -> tuple[Any, Any, Any, Callable[[], Tensor]]:
    torch.manual_seed(0)
    model, x = nn.Linear(4, 3), torch.randn(8, 4)
    optimizer = lso.LandscapeOptimizer(torch.optim.SGD(model.named_parameters(), lr=0.1), lso.SAM(rho=0.1))
    scaler = torch.amp.GradScaler("cpu")

    def closure() -> Tensor:
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=dtype):
            loss = model(x).float().square().mean()
        scaler.scale(loss).backward()
        return loss

    return model, optimizer, scaler, closure


def scaler_steps_with_the_closure(optimizer: Any, scaler: Any, closure: Any) -> None:
    closure()
    scaler.step(optimizer, closure)


def scaler_steps_alone(optimizer: Any, scaler: Any, closure: Any) -> None:
    closure()
    scaler.step(optimizer)


def unscaled_before(optimizer: Any, scaler: Any, closure: Any) -> None:
    """As Lightning does."""
    closure()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)


def step_with_a_scaled_closure(optimizer: Any, scaler: Any, closure: Any) -> None:
    optimizer.step(closure)


@pytest.mark.fast
@pytest.mark.parametrize(
    "way,dtype",
    [
        *[
            (way, dtype)
            for way in (scaler_steps_with_the_closure, scaler_steps_alone, unscaled_before)
            for dtype in (torch.float16, torch.bfloat16)
        ],
        (step_with_a_scaled_closure, torch.float16),
    ],
)
def test_refused(way: Callable[..., None], dtype: torch.dtype) -> None:
    model, optimizer, scaler, closure = problem(dtype)
    before = model.weight.detach().clone()
    with pytest.raises(lso.UserError) as caught:
        way(optimizer, scaler, closure)
    assert str(caught.value).startswith(FP16) and "\n" not in str(caught.value)
    assert torch.equal(model.weight, before)


@pytest.mark.fast
def test_a_scaler_that_is_switched_off_is_none() -> None:
    model, optimizer, _, _ = problem(torch.bfloat16)
    scaler = torch.amp.GradScaler("cpu", enabled=False)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(torch.ones(2, 4)).square().mean()
        scaler.scale(loss).backward()
        return loss

    scaler.step(optimizer, closure)
    scaler.update()
    assert optimizer.clock.steps == 1
