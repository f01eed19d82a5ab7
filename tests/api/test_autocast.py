"""Autocast keeps casts of the weights until its outermost context ends; no move of the weights is lost in them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import elastic_lsopt as lso
from elastic_lsopt.backends.detect import backend_for
from elastic_lsopt.space.vector import Vector
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


def entering(inside: bool, dtype: torch.dtype) -> Callable[[Any, Any], Tensor]:
    """The loss, that enters autocast itself if `inside`."""

    def loss_fn(model: Any, batch: Any) -> Tensor:
        with torch.autocast("cpu", dtype=dtype, enabled=True) if inside else nullcontext():
            return loss_of(model, batch)

    return loss_fn


def by_optimizer(
    model: nn.Module, batch: Any, *, method: Any = None, inside: bool = False, dtype: torch.dtype = torch.bfloat16
) -> Callable[[], Any]:
    base = torch.optim.SGD(model.named_parameters(), lr=0.5)
    optimizer, loss_fn = lso.LandscapeOptimizer(base, method or lso.SAM(rho=RHO)), entering(inside, dtype)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_fn(model, batch)
        loss.backward()
        return loss

    def step() -> Any:
        optimizer.step(closure)
        return optimizer.last_step

    return step


def by_engine(
    model: nn.Module, batch: Any, *, method: Any = None, inside: bool = False, dtype: torch.dtype = torch.bfloat16
) -> Callable[[], Any]:
    base = torch.optim.SGD(model.parameters(), lr=0.5)
    engine = lso.Engine(backend_for(model, base), method or lso.SAM(rho=RHO), loss_fn=entering(inside, dtype))

    def step() -> Any:
        engine.train_batch([batch])
        return engine.last_step

    return step


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


@pytest.mark.fast
@pytest.mark.parametrize("face", [by_optimizer, by_engine])
@pytest.mark.parametrize("method,seen_at", [(lso.SAM(rho=1e-3), 0), (lso.LPFSGD(parts=1, gamma=1e-4, alpha=1.0), 1)])
def test_fidelity_is_measured_in_the_type_that_the_loss_enters_itself(
    caplog: pytest.LogCaptureFixture, face: Any, method: Any, seen_at: int
) -> None:
    model, batch = problem()
    steps = face(model, batch, method=method, inside=True)
    reports = [steps() for _ in range(3)]
    assert [r.fidelity is not None for r in reports] == [i == seen_at for i in range(3)]
    assert 0.0 < reports[seen_at].fidelity.cosine < 0.9
    [line] = [r.getMessage() for r in caplog.records if "sees another perturbation" in r.getMessage()]
    assert line.startswith("the forward pass in torch.bfloat16 sees another perturbation")


@pytest.mark.fast
def test_the_cosine_that_is_told_is_that_of_the_rounded_weights() -> None:
    model, batch = problem()
    step = by_optimizer(model, batch, method=lso.SAM(rho=1e-3), inside=True)
    w = torch.cat([p.detach().flatten() for p in model.parameters()])
    with bf16():
        loss = loss_of(model, batch)
    g = torch.cat([t.flatten() for t in torch.autograd.grad(loss, list(model.parameters()))])
    asked = 1e-3 * g / g.norm()
    got = (w + asked).bfloat16().double() - w.bfloat16().double()
    wanted = torch.nn.functional.cosine_similarity(asked.double(), got, dim=0).item()
    assert step().fidelity.cosine == pytest.approx(wanted, abs=1e-6)


@pytest.mark.fast
@pytest.mark.parametrize("outside", [False, True])
@pytest.mark.parametrize("face", [by_optimizer, by_engine])
def test_fp16_is_refused_before_anything_has_changed(face: Any, outside: bool) -> None:
    model, batch = problem()
    before = [p.detach().clone() for p in model.parameters()]
    step = face(model, batch, inside=not outside, dtype=torch.float16)
    with (
        torch.autocast("cpu", dtype=torch.float16, enabled=outside),
        pytest.raises(lso.UserError, match=r"fp16 needs loss scaling .GradScaler.*use bf16") as caught,
    ):
        step()
    assert "\n" not in str(caught.value)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))


@pytest.mark.fast
@pytest.mark.parametrize("mode", ["kept", "rebuilt", "blockwise", "differences"])
def test_products_are_exact_inside_autocast(mode: Any) -> None:
    """In the space's precision, whatever is around them."""
    model, batch = problem()
    named = list(model.parameters())
    v = [torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) for i, p in enumerate(named)]
    g = torch.autograd.grad(loss_of(model, batch), named, create_graph=True)
    wanted = torch.autograd.grad(g, named, v)
    with bf16():
        space, oracle = lso.attach(model, loss_of, [batch], products=mode)
        found = oracle.hvp(space.zeros().copy_(Vector(space, [t.flatten() for t in v]))).tensors
    apart = paper_loops.norm([a.flatten() - b for a, b in zip(wanted, found, strict=True)])
    assert apart < (1e-2 if mode == "differences" else 1e-5) * paper_loops.norm(wanted)


@pytest.mark.fast
@pytest.mark.parametrize("mode", ["rebuilt", "blockwise"])
def test_a_product_runs_its_blocks_again_in_the_losses_own_autocast(mode: Any) -> None:
    model, batch = problem()
    space, oracle = lso.attach(model, entering(True, torch.bfloat16), [batch], products=mode)
    v = oracle.gradient().clone()
    inside = oracle.hvp(v)
    _, plain = lso.attach(model, loss_of, [batch], products="kept")
    assert space.norm(inside - plain.hvp(v)) < 0.05 * space.norm(inside)
