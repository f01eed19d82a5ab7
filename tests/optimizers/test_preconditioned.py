"""The way up in the ball, or the metric, of Adam: by the second moment that the coming step will have."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import elastic_lsopt as lso
from tests.optimizers.small_net import Net, adamw, at, batch, length, loss_fn

pytestmark = pytest.mark.fast


def ours(ps: Any) -> torch.optim.Optimizer:
    """Through our own adapter, beside another rule; each group has a b2 of its own."""
    named = list(ps)
    groups = [{"params": [named[0][1]], "update": "lamb"}, {"params": [p for _, p in named[1:]], "betas": (0.9, 0.99)}]
    return lso.UpdateOptimizer(groups, "AdamW", lr=0.01)


MOMENTS: dict[str, tuple[Any, Any]] = {
    "adamw": (adamw, lambda v, g, t, first: (0.99 * v + 0.01 * g**2, 1 - 0.99**t)),
    "ours": (ours, lambda v, g, t, first: (
        (0.999 * v + 0.001 * g**2, 1 - 0.999**t) if first else (0.99 * v + 0.01 * g**2, 1 - 0.99**t)
    )),
    "rmsprop": (lambda ps: torch.optim.RMSprop(ps, lr=0.01, alpha=0.9),
                lambda v, g, t, first: (0.9 * v + 0.1 * g**2, 1.0)),
    "adagrad": (lambda ps: torch.optim.Adagrad(ps, lr=0.01, initial_accumulator_value=0.0),
                lambda v, g, t, first: (v + g**2, 1.0)),
}  # fmt: skip
"""A base, and by its definition (v after step t with gradient g, its divisor); first: of the first parameter."""


@pytest.mark.parametrize("kind", ["adam", "adam_metric"])
@pytest.mark.parametrize("base", MOMENTS)
@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_preconditioned_by_the_second_moment_of_the_coming_step(kind: Any, base: str, clip: float) -> None:
    """q = g / (sqrt v + 1e-8), v as a step with g, clipped, would make it; ||e|| = rho, or e' sqrt(v) e = rho^2."""
    build, after = MOMENTS[base]
    steps, rho = 4, 0.2
    model = Net().double()
    named = list(model.named_parameters())
    engine = lso.Engine.of(
        model, build(iter(named)), method=lso.SAM(rho=rho, precondition=kind), loss_fn=loss_fn, max_grad_norm=clip
    )
    twin, v = copy.deepcopy(model), {n: torch.zeros_like(p) for n, p in named}
    points: list[dict[str, Tensor]] = []
    model.register_forward_pre_hook(
        lambda *_: points.append({n: p.detach().clone() for n, p in model.named_parameters()})
    )

    def clipped(g: dict[str, Tensor]) -> dict[str, Tensor]:
        factor = min(clip / (length(g.values()) + 1e-6), 1.0) if clip else 1.0
        return {n: factor * t for n, t in g.items()}

    for t in range(1, steps + 1):
        points.clear()
        engine.train_batch([batch()])
        g = at(twin, points[0])
        coming = {n: after(v[n], u, t, n == named[0][0]) for n, u in clipped(g).items()}
        root = {n: (sum_ / over).sqrt() + 1e-8 for n, (sum_, over) in coming.items()}
        q = {n: g[n] / root[n] for n in v}
        whole = length(q.values()) if kind == "adam" else math.sqrt(sum(float((g[n] * q[n]).sum()) for n in v))
        for n in v:
            assert torch.allclose(points[1][n] - points[0][n], rho * q[n] / whole, rtol=0, atol=1e-11), (t, n)
        up = clipped(at(twin, points[1]))
        v = {n: after(v[n], up[n], t, n == named[0][0])[0] for n in v}


def second_step(method: Any, **of_base: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of two steps, the first weight's far smaller in the second, and e / ||e|| of that."""
    w, seen, scale = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64)), list[Tensor](), [1.0]
    base = torch.optim.AdamW([w], lr=1e-3, betas=(0.9, 0.5), weight_decay=0.0, **of_base)
    optimizer = lso.LandscapeOptimizer(base, method)

    def closure() -> Tensor:
        optimizer.zero_grad()
        seen.append(w.detach().clone())
        loss = (w[0] ** 2 * scale[0] + w[1] ** 2) / 2
        loss.backward()
        return loss

    optimizer.step(closure)
    scale[0] = 1e-3
    optimizer.step(closure)
    e = seen[3] - seen[2]
    return seen[0], seen[2] * torch.tensor([1e-3, 1.0], dtype=torch.float64), e / e.norm()


def test_preconditioned_by_the_largest_moment_of_amsgrad() -> None:
    """v falls after a large gradient, and AMSGrad's root does not: v of the first step divides in the second."""
    g1, g2, along = second_step(lso.SAM(rho=1e-9, precondition="adam"), amsgrad=True)
    q = g2 / ((torch.maximum(0.5 * g1**2, 0.25 * g1**2 + 0.5 * g2**2) / 0.75).sqrt() + 1e-8)
    assert torch.allclose(along, q / q.norm(), rtol=0, atol=1e-5)


def test_friendly_sams_root_is_the_gradients_and_not_its_directions() -> None:
    g1, g2, along = second_step(lso.FriendlySAM(rho=1e-9, sigma=0.5, precondition="adam"))
    q = (g2 - 0.5 * g1) / (((0.25 * g1**2 + 0.5 * g2**2) / 0.75).sqrt() + 1e-8)
    assert torch.allclose(along, q / q.norm(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["adam", "adam_metric"])
@pytest.mark.parametrize("method", [lso.SAM, lso.FriendlySAM, lso.GSAM, lso.LookSAM, lso.WSAM])
def test_what_has_no_moment_yet_takes_no_more_than_its_share(kind: Any, method: Any) -> None:
    """Row 7 is used in step 25 for the first time: in no step is e longer than Adam's roots allow, or of one row."""
    torch.manual_seed(0)
    model = nn.Embedding(10, 4)
    optimizer = lso.LandscapeOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-3), method(precondition=kind))
    points: list[Tensor] = []
    for step in range(26):
        rows = torch.tensor([0, 1, 2] + [7] * (step == 25))
        points.clear()

        def closure(rows: Tensor = rows) -> Tensor:
            optimizer.zero_grad()
            points.append(model.weight.detach().clone())
            loss = model(rows).square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        if len(points) > 1:
            e = points[1] - points[0]
            assert float(e.norm()) <= (0.0501 if kind == "adam" else 0.5), (step, e.norm())
            others = float(e[:3].norm())
    assert len(points) == 2  # LookSAM's interval is 5
    # g / root: about 1 in old rows, at most sqrt((1 - b2^26) / (1 - b2)) = 5.1 in a new one
    # (Friendly SAM's own way up is what is new in the gradient: here, row 7.)
    assert method is lso.FriendlySAM or others > float(e[7].norm()) / 8
