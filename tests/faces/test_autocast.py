"""Autocast keeps casts of the weights until its outermost context ends; no move of the weights is lost in them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import elastic_lsopt as lso
from elastic_lsopt.backends.detect import backend_for
from tests.oracles import paper_loops

RHO = 2.0


def bf16(enabled: bool = True) -> Any:
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled)


def problem() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4))
    return model, (torch.randn(32, 6), torch.randint(0, 4, (32,)))


def loss_of(model: Any, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]).float(), batch[1])


def sam_by_hand(model: nn.Module, batch: Any, steps: int) -> None:
    """SAM over SGD with each pass in an autocast context of its own, which is empty at its start."""

    def gradients() -> list[Tensor]:
        with bf16():
            loss = loss_of(model, batch)
        return list(torch.autograd.grad(loss, list(model.parameters())))

    for _ in range(steps):
        g = gradients()
        scale = RHO / paper_loops.norm(g)
        with torch.no_grad():
            before = [p.clone() for p in model.parameters()]
            for p, d in zip(model.parameters(), g, strict=True):
                p.add_(d, alpha=scale)
        g = gradients()
        with torch.no_grad():
            for p, was, d in zip(model.parameters(), before, g, strict=True):
                p.copy_(was - 0.5 * d)


def by_optimizer(model: nn.Module, batch: Any) -> Callable[[], object]:
    optimizer = lso.LandscapeOptimizer(torch.optim.SGD(model.named_parameters(), lr=0.5), lso.SAM(rho=RHO))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        return loss

    return lambda: optimizer.step(closure)


def by_engine(model: nn.Module, batch: Any) -> Callable[[], object]:
    base = torch.optim.SGD(model.parameters(), lr=0.5)
    engine = lso.Engine(backend_for(model, base), lso.SAM(rho=RHO), loss_fn=loss_of)
    return lambda: engine.train_batch([batch])


@pytest.mark.fast
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("face", [by_optimizer, by_engine])
def test_steps_in_one_autocast_context_are_the_papers(face: Any, compiled: bool) -> None:
    wanted, batch = problem()
    sam_by_hand(wanted, batch, 3)
    model, _ = problem()
    start = [p.detach().clone() for p in model.parameters()]
    if compiled:
        model.compile(backend="eager")
    step = face(model, batch)
    with bf16():
        for _ in range(3):
            step()
    moved = max(float((a.detach() - b).abs().max()) for a, b in zip(model.parameters(), start, strict=True))
    apart = max(
        float((a - b).detach().abs().max()) for a, b in zip(model.parameters(), wanted.parameters(), strict=True)
    )
    assert moved > 0.05 and apart < 1e-6, (moved, apart)


@pytest.mark.fast
def test_a_probe_in_autocast_sees_the_weights_that_it_moves() -> None:
    model, batch = problem()

    def measured(outside: bool) -> float:
        def loss_fn(model: Any, batch: Any) -> Tensor:
            with bf16():
                return loss_of(model, batch)

        with bf16(outside):
            space, oracle = lso.attach(model, loss_of if outside else loss_fn, [batch])
            return lso.probes.lpf(space, oracle, sigma=0.5, draws=20).excess

    inside = measured(outside=False)
    assert inside > 0.1 and measured(outside=True) == pytest.approx(inside, rel=1e-6)


@pytest.mark.fast
def test_a_forward_between_steps_in_the_same_context_sees_the_new_weights() -> None:
    model, batch = problem()
    step = by_optimizer(model, batch)
    with bf16():
        loss_of(model, batch)
        step()
        now = loss_of(model, batch).item()
    with bf16():
        assert now == loss_of(model, batch).item()
