"""Adaptive memory's coefficient: the maximum of the dual that the paper derives it from, and what it is in corners."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import elastic_lsopt as lso

pytestmark = pytest.mark.fast

LR = 0.1


def memory_after(first: list[float], second: list[float], **options: Any) -> torch.Tensor:
    """d after two gradients, the second of which is met with d = the first; weights do not matter to them."""
    model = torch.nn.Linear(len(first), 1, bias=False).double()
    base = lso.UpdateOptimizer(model.parameters(), "adaptive_memory", form="sgd", lr=LR, **options)
    engine = lso.Engine.of(model, base, loss_fn=lambda model, batch: model(batch[0]).sum())
    for gradient in (first, second):
        engine.train_batch([(torch.tensor([gradient], dtype=torch.float64),)])
    d: Any = engine.families["update/adaptive_memory"].state_dict()["d"]
    return d.tensors[0].clone()


CORNERS = [
    ("orthogonal and as long", [1.0, 0.0], [0.0, 1.0], {"lam": 0.0}, 0.5),
    ("opposite", [1.0, 0.0], [-1.0, 0.0], {"lam": 0.0}, 0.25),
    ("the same", [1.0, 2.0], [1.0, 2.0], {"lam": 0.1}, 0.0),
    ("no memory", [1.0, 0.0], [0.0, 1.0], {"lam": 0.0, "most": 0.0}, 0.0),
    ("the most", [1.0, 0.0], [1.1, 0.0], {"lam": 0.1}, 0.9),
]


@pytest.mark.parametrize(("first", "second", "options", "beta"), [c[1:] for c in CORNERS], ids=[c[0] for c in CORNERS])
def test_beta_in_corners(first: list[float], second: list[float], options: dict[str, float], beta: float) -> None:
    lam, (d, g) = options["lam"], (torch.tensor(v, dtype=torch.float64) for v in (first, second))
    wanted = ((beta + lam) * d + (1 - beta) * g) / (1 + lam)
    assert torch.allclose(memory_after(first, second, **options), wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("lam", [0.0, 0.1, 1.0])
def test_beta_maximises_the_dual(lam: float) -> None:
    """b (f^ - f) - lr / (2 (1 + lam)) ||g + lam d + b (d - g)||^2, where f^ - f is lr <g, d>, on a grid."""
    draw = torch.Generator().manual_seed(3)
    d, g = (torch.randn(6, generator=draw, dtype=torch.float64) for _ in range(2))
    g += 0.5 * d
    found = memory_after(d.tolist(), g.tolist(), lam=lam)
    grid = torch.linspace(0, 0.9, 9001, dtype=torch.float64)[:, None]
    length = (g + lam * d + grid * (d - g)).square().sum(1)
    dual = grid[:, 0] * LR * float(g @ d) - LR / (2 * (1 + lam)) * length
    beta = float(grid[dual.argmax()])
    assert 0 < beta < 0.9
    assert torch.allclose(found, ((beta + lam) * d + (1 - beta) * g) / (1 + lam), rtol=0, atol=2e-4)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"form": "adam"}, "form='adam' must be adamw or sgd"),
        ({"lam": -1}, "lam=-1 must be a number >= 0"),
        ({"most": 1.0}, "most=1.0 must be a number >= 0 and < 1"),
        ({"lam": 10.0}, "most=0.9 must be >= 0.1 lam, lam=10.0"),
        ({"betas": (0.9, 0.9)}, "has a hyper-parameter betas"),
    ],
    ids=str,
)
def test_bad_input(options: dict[str, Any], says: str) -> None:
    with pytest.raises(lso.UserError) as caught:
        lso.UpdateOptimizer(torch.nn.Linear(2, 2).parameters(), "adaptive_memory", lr=0.1, **options)
    assert says in str(caught.value) and "\n" not in str(caught.value)
