"""A net of two layers and a norm with a batch of its own, and where a method looks at it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

import elastic_lsopt as lso


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.first, self.norm, self.last = nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(torch.tanh(self.first(x))))


def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(6)
    return torch.randn(8, 4, dtype=torch.float64), torch.randint(0, 3, (8,))


def loss_fn(model: Any, b: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(b[0]), b[1])


def seen(method: Any, base: Any = None, steps: int = 1, total: int | None = 8) -> list[dict[str, Tensor]]:
    """e of each forward of the last step: the weights that it saw, less those of the step."""
    model = Net().double()
    engine = lso.Engine.of(
        model, (base or (lambda ps: torch.optim.SGD(ps, lr=0.1)))(model.named_parameters()), method=method,
        loss_fn=loss_fn, total_samples=None if total is None else total * steps,
    )  # fmt: skip
    points: list[dict[str, Tensor]] = []
    model.register_forward_pre_hook(
        lambda *_: points.append({n: p.detach().clone() for n, p in model.named_parameters()})
    )
    for _ in range(steps):
        points.clear()
        engine.train_batch([batch()])
    return [{n: p[n] - points[0][n] for n in p} for p in points]


def gradient() -> dict[str, Tensor]:
    model = Net().double()
    loss_fn(model, batch()).backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def length(of: Any) -> float:
    return math.sqrt(sum(float(t.square().sum()) for t in of))


def momentum(ps: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(ps, lr=0.1, momentum=0.9)


def adamw(ps: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(ps, lr=0.01, betas=(0.9, 0.99), eps=1e-8)


def at(model: nn.Module, point: dict[str, Tensor]) -> dict[str, Tensor]:
    model.load_state_dict(point)
    model.zero_grad()
    loss_fn(model, batch()).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
