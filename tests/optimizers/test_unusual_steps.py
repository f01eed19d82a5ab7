"""Steps of closures and parts, and steps that end before their time."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import elastic_lsopt as lso
from tests.optimizers.small_net import Net, batch, gradient, loss_fn

pytestmark = pytest.mark.fast


IN_PARTS = [
    lso.MicroSAM(rho=0.2, parts=2), lso.MicroSAM(rho=0.2, parts=2, every=2), lso.RWP(gamma=0.05),
    lso.LPFSGD(parts=2, gamma=0.05, alpha=1.0), lso.EntropySGD(inner_steps=2),
]  # fmt: skip


@pytest.mark.parametrize("method", IN_PARTS, ids=lambda m: f"{type(m).__name__}-{getattr(m, 'every', 1)}")
@pytest.mark.parametrize("accumulated", [False, True])
def test_closures_in_parts(method: Any, accumulated: bool) -> None:
    """A closure a part, in steps that go up and in those that do not, is what an engine does with the micro-batches."""
    one, other = Net().double(), Net().double()
    x, y = batch()
    halves = [(x[:4], y[:4]), (x[4:], y[4:])]
    engine = lso.Engine.of(one, torch.optim.SGD(one.named_parameters(), lr=0.1), method=method, loss_fn=loss_fn)
    optimizer = lso.LandscapeOptimizer(torch.optim.SGD(other.named_parameters(), lr=0.1), method)

    def closure(b: tuple[Tensor, Tensor]) -> Any:
        def run() -> Tensor:
            optimizer.zero_grad()
            loss = loss_fn(other, b) / (2 if accumulated else 1)
            loss.backward()
            return loss

        return run

    for _ in range(3):
        engine.train_batch(halves)
        closures = [closure(half) for half in halves]
        if accumulated:
            optimizer.accumulate(closures[0])
            optimizer.step(optimizer.accumulate(closures[1]))
        else:
            optimizer.step(closures)
        assert optimizer.last_step is not None and engine.last_step is not None
        assert optimizer.last_step.passes == engine.last_step.passes
        for p, q in zip(one.parameters(), other.parameters(), strict=True):
            assert (p - q).abs().max() < 1e-12


def test_what_a_closure_cannot_give() -> None:
    model = Net().double()
    with pytest.raises(lso.UserError, match="needs the logits, which a closure does not give"):
        lso.LandscapeOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), lso.FunctionalSAM())


def test_a_gradient_too_large_for_the_step_moves_nothing_beforehand() -> None:
    """Decoupled WSAM moves the weights just before the base steps: not where the step is about to be left out."""
    model = Net().double()
    engine = lso.Engine.of(
        model, torch.optim.SGD(model.parameters(), lr=0.1), method=lso.WSAM(rho=0.1),
        loss_fn=lambda m, b: loss_fn(m, b) * 1e30,
    )  # fmt: skip
    before = [p.detach().clone() for p in model.parameters()]
    engine.train_batch([batch()])
    assert engine.last_step is not None and engine.last_step.skipped and engine.method_state == {}
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_rwp_where_an_update_has_one_micro_batch_only() -> None:
    """As the Trainer's last update of an epoch may: both gradients are then of that micro-batch."""
    from elastic_lsopt.api.trainer.trainer_oracle import TrainerOracle

    model = Net().double()
    engine = lso.Engine.of(model, torch.optim.SGD(model.parameters(), lr=0.1), loss_fn=loss_fn)

    def run(b: tuple[Tensor, Tensor]) -> Tensor:
        loss = loss_fn(model, b)
        loss.backward()
        return loss

    oracle = TrainerOracle(engine.space, engine.backend, engine.clock, run, [batch()])
    found = lso.RWP(gamma=0.0, alpha=0.3).gradient(engine.space, oracle, {})
    wanted = gradient()
    for piece, t in zip(engine.space.layout.pieces, found.tensors, strict=True):
        name = engine.space.layout.parameters[piece.parameter].name
        assert torch.allclose(t, wanted[name].flatten(), rtol=0, atol=1e-12)


def test_looksam_forgets_a_direction_that_it_could_not_finish() -> None:
    """Its second pass is not finite: the steps up to the next k-th are the base's, not led by a raw gradient."""
    model, plain = Net().double(), Net().double()
    forwards = 0

    def second_fails(m: Any, b: tuple[Tensor, Tensor]) -> Tensor:
        nonlocal forwards
        forwards += 1
        return loss_fn(m, b) * (math.nan if forwards == 2 else 1.0)

    base = torch.optim.SGD(model.parameters(), lr=0.1)
    engine = lso.Engine.of(model, base, method=lso.LookSAM(rho=0.1, k=3, alpha=0.5), loss_fn=second_fails)
    sgd = torch.optim.SGD(plain.parameters(), lr=0.1)
    for step in range(3):
        engine.train_batch([batch()])
        assert engine.last_step is not None and engine.last_step.skipped == (step == 0)
        if step:
            sgd.zero_grad()
            loss_fn(plain, batch()).backward()
            sgd.step()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=0, atol=1e-12)
