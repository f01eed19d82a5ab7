"""Independent code, where its algorithm is the paper's: pytorch_optimizer's classes, written by others."""

from __future__ import annotations

from typing import Any

import pytest
import pytorch_optimizer
import torch
from torch import nn

import elastic_lsopt as lso

pytestmark = pytest.mark.fast


def net() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(4)
    return [(torch.randn(6, 5, dtype=torch.float64), torch.randint(0, 3, (6,))) for _ in range(6)]


@pytest.mark.parametrize(
    "theirs,ours,hyper",
    [
        ("SAM", lso.SAM(rho=0.3), {"rho": 0.3}),
        ("FriendlySAM", lso.FriendlySAM(rho=0.3, sigma=1.0, decay=0.9), {"rho": 0.3, "sigma": 1.0, "lmbda": 0.9}),
        ("WSAM", lso.WSAM(rho=0.3, gamma=0.7), {"rho": 0.3, "gamma": 0.7, "decouple": True}),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_six_steps_of_sgd(theirs: str, ours: Any, hyper: dict[str, Any]) -> None:
    one, other = net(), net()
    kind: Any = getattr(pytorch_optimizer, theirs)
    if theirs == "WSAM":
        their = kind(one, one.parameters(), torch.optim.SGD, lr=0.1, **hyper)
    else:
        their = kind(one.parameters(), torch.optim.SGD, lr=0.1, **hyper)
    mine = lso.LandscapeOptimizer(torch.optim.SGD(other.named_parameters(), lr=0.1), ours)
    for x, y in batches():

        def run(model: nn.Module, optimizer: Any, x: torch.Tensor = x, y: torch.Tensor = y) -> torch.Tensor:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            return loss

        run(one, their)
        their.step(lambda: run(one, their))
        mine.step(lambda: run(other, mine))
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        assert (p - q).abs().max() < 1e-8  # theirs takes its norms in fp32
