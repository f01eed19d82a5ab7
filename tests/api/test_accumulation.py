"""Micro-batches that a user's loop accumulates: all of them in each pass, or a refusal; never one of four."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import elastic_lsopt as lso
from tests.cases.api import closure_of
from tests.oracles import paper_loops

K = 4


def problem(method: Any = None) -> tuple[nn.Module, lso.LandscapeOptimizer, list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    base = torch.optim.SGD(model.named_parameters(), lr=0.1, momentum=0.9)
    optimizer = lso.LandscapeOptimizer(base, method or lso.SAM(rho=0.3), samples_per_step=4 * K)
    batches = [(torch.randn(4, 5).double(), torch.randint(0, 3, (4,))) for _ in range(2 * K)]
    return model, optimizer, batches


def by_the_paper(model: nn.Module, batches: Any, method: str, hyper: dict[str, Any]) -> tuple[nn.Module, list[float]]:
    """The paper's loop on global batches of K micro-batches."""
    model = copy.deepcopy(model)
    base = torch.optim.SGD(list(model.named_parameters()), lr=0.1, momentum=0.9)
    steps = [batches[i : i + K] for i in range(0, len(batches), K)]
    return model, paper_loops.run(model, steps, base, method, hyper)


def furthest(a: nn.Module, b: nn.Module) -> float:
    return max(float((p - q).detach().abs().max()) for p, q in zip(a.parameters(), b.parameters(), strict=True))


class Lightning:
    """Lightning's automatic optimisation, written out: a closure runs training_step, zero_grad (the first micro-batch's
    alone) and backward of loss / K; all but the last are called, the last goes into step(), wrapped by the precision
    plugin, whose hooks run after it.
    """

    def __init__(self, model: Any, optimizer: Any, hand_in: Callable[[Any], Any]) -> None:
        self.model, self.optimizer, self.hand_in = model, optimizer, hand_in
        self.calls = 0

    def closure(self, number: int, batch: Any) -> Callable[[], Tensor]:
        def closure() -> Tensor:
            self.calls += 1
            loss = paper_loops.cross_entropy(self.model, batch) / K
            if number % K == 0:
                self.optimizer.zero_grad()
            loss.backward()
            return loss.detach().clone()

        return closure

    def after(self, closure: Callable[[], Tensor]) -> Tensor:
        loss = closure()
        assert all(p.grad is not None for p in self.model.parameters())  # on_before_optimizer_step, clipping
        return loss

    def fit(self, batches: Any) -> list[float]:
        losses = []
        for number, batch in enumerate(batches):
            closure = self.hand_in(self.closure(number, batch))
            if (number + 1) % K:
                closure()
            else:
                losses.append(self.optimizer.step(closure=partial(self.after, closure)))
        return losses


METHODS = [("none", {}), ("sam", {"rho": 0.3}), ("lpf_sgd", {"parts": 2, "gamma": 0.1, "alpha": 1.0})]


@pytest.mark.fast
@pytest.mark.parametrize("method,hyper", METHODS)
def test_lightnings_pattern_with_closures_handed_in_is_the_papers(method: str, hyper: dict[str, Any]) -> None:
    model, optimizer, batches = problem(lso.registry.build(method, **hyper))
    wanted, losses = by_the_paper(model, batches, method, hyper)
    loop = Lightning(model, optimizer, optimizer.accumulate)
    assert loop.fit(batches) == pytest.approx(losses, abs=1e-12)
    assert furthest(model, wanted) < 1e-12
    passes = 2 if method == "sam" else 1
    assert loop.calls == len(batches) * passes + 2 * (K - 1)
    assert optimizer.clock.samples == 4 * len(batches)


@pytest.mark.fast
@pytest.mark.parametrize("method,hyper", METHODS[:2])
def test_lightnings_pattern_without_that_is_refused(method: str, hyper: dict[str, Any]) -> None:
    model, optimizer, batches = problem(lso.registry.build(method, **hyper))
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(lso.UserError, match="backward pass outside of step") as caught:
        Lightning(model, optimizer, lambda closure: closure).fit(batches)
    assert "\n" not in str(caught.value) and "optimizer.accumulate(closure)" in str(caught.value)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))


@contextmanager
def accelerator() -> Iterator[Any]:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    try:
        yield Accelerator(cpu=True, gradient_accumulation_steps=K)
    finally:
        AcceleratorState._reset_state(True)
        GradientState._reset_state()


def accelerated(hand_in: bool, method: Any = None) -> tuple[float, int]:
    """accelerate's documented loop with closures, on its own `accumulate`: distance from the paper's, closure calls."""
    model, optimizer, batches = problem(method)
    wanted, _ = by_the_paper(model, batches, "sam", {"rho": 0.3})
    calls = 0
    with accelerator() as a:
        model, prepared = a.prepare(model, optimizer)
        scheduler = a.prepare(torch.optim.lr_scheduler.LambdaLR(prepared, lambda step: 1.0))
        for batch in batches:
            with a.accumulate(model):

                def closure(batch: Any = batch) -> Tensor:
                    nonlocal calls
                    calls += 1
                    prepared.zero_grad()
                    loss = paper_loops.cross_entropy(model, batch)
                    a.backward(loss)
                    return loss / K

                prepared.step(optimizer.accumulate(closure) if hand_in else closure)
                scheduler.step()
                prepared.zero_grad()
    return furthest(model, wanted), calls


@pytest.mark.fast
def test_accelerates_accumulate_with_closures_handed_in_is_the_papers() -> None:
    apart, calls = accelerated(hand_in=True)
    assert apart < 1e-12 and calls == 2 * 2 * K


@pytest.mark.fast
def test_accelerates_accumulate_without_that_is_refused() -> None:
    with pytest.raises(lso.UserError, match="accelerate accumulates 4 micro-batches and passes on the closure of the"):
        accelerated(hand_in=False)


@pytest.mark.fast
def test_a_gradient_of_the_last_step_or_of_zeros_is_no_foreign_one() -> None:
    model, optimizer, batches = problem()

    def plainly() -> Tensor:  # without zero_grad
        loss = paper_loops.cross_entropy(model, batches[0])
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(plainly)
    plainly()
    with pytest.raises(lso.UserError, match="backward pass outside of step"):
        optimizer.step(plainly)
    for p in model.parameters():
        assert p.grad is not None
        p.grad.zero_()
    optimizer.step(plainly)
    plainly()
    model.zero_grad()
    optimizer.step(plainly)
    assert optimizer.clock.steps == 5


@pytest.mark.fast
@pytest.mark.parametrize(
    "parts,closures,last,says",
    [
        (1, 2, False, "step() got another closure than the last of the 2 handed to accumulate()"),
        (2, 3, True, "the method takes 2 part(s), step() got 3 closure(s)"),
    ],
)
def test_closures_that_do_not_fit_are_refused(parts: int, closures: int, last: bool, says: str) -> None:
    model, optimizer, batches = problem(lso.LPFSGD(parts=parts, gamma=0.1, alpha=1.0))

    mine = [closure_of(optimizer, model, batch) for batch in batches]
    made = [optimizer.accumulate(closure) for closure in mine[:closures]]
    with pytest.raises(lso.UserError) as caught:
        optimizer.step(made[-1] if last else mine[0])
    assert str(caught.value).startswith(says) and "\n" not in str(caught.value)
    optimizer.space.resync()
    optimizer.step(mine[:parts])  # what was handed in is forgotten
    assert optimizer.clock.steps == 1
