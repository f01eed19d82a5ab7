"""Buffers around a step: running statistics move in the first pass only, and are saved and resumed with the rest."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import elastic_lsopt as lso
from elastic_lsopt.backends.detect import backend_for
from elastic_lsopt.checkpoint.checkpointer import Checkpointer
from tests.oracles import paper_loops

RHO = 2.0


class Normed(nn.Module):
    """Batch norm, a norm without weights, and a codebook that its forward replaces instead of writing to it."""

    codes: Tensor

    def __init__(self, kind: type[nn.Module] = nn.BatchNorm1d) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, 8), kind(8), nn.Tanh(), nn.Linear(8, 3))  # type: ignore[call-arg]
        self.bare = nn.BatchNorm1d(3, affine=False)
        self.register_buffer("codes", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bare(self.body(x))
        if self.training:
            self.codes = 0.9 * self.codes + 0.1 * out.detach().square().mean(0)
        return out


def problem(kind: type[nn.Module] = nn.BatchNorm1d) -> tuple[Normed, list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(0)
    return Normed(kind), [(torch.randn(12, 5), torch.randint(0, 3, (12,))) for _ in range(6)]


def optimizer_of(trained: nn.Module, *, named: bool = True, **more: Any) -> lso.LandscapeOptimizer:
    base = torch.optim.AdamW(trained.named_parameters() if named else trained.parameters(), lr=1e-2)
    return lso.LandscapeOptimizer(base, lso.SAM(rho=RHO), samples_per_step=12, **more)


def train(model: Any, optimizer: lso.LandscapeOptimizer, batches: Any) -> None:
    for batch in batches:

        def closure(batch: Any = batch) -> Tensor:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(batch[0]), batch[1])
            loss.backward()
            return loss

        optimizer.step(closure)


def sam_by_hand(model: nn.Module, batches: Any) -> None:
    """SAM over AdamW; the second pass runs on a copy of the model, so it cannot move the model's statistics."""
    base = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for x, y in batches:
        before = copy.deepcopy(model)
        g = torch.autograd.grad(nn.functional.cross_entropy(model(x), y), list(model.parameters()))
        with torch.no_grad():
            for p, d in zip(before.parameters(), g, strict=True):
                p.add_(d, alpha=RHO / paper_loops.norm(g))
        there = torch.autograd.grad(nn.functional.cross_entropy(before(x), y), list(before.parameters()))
        for p, d in zip(model.parameters(), there, strict=True):
            p.grad = d
        base.step()


def differ(a: nn.Module, b: nn.Module) -> dict[str, float]:
    mine, theirs = a.state_dict(), b.state_dict()
    return {n: d for n, t in mine.items() if (d := float((t - theirs[n]).abs().max())) > 1e-6}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("named", [True, False])
def test_only_the_first_pass_moves_running_statistics(named: bool, compiled: bool) -> None:
    model, batches = problem()
    wanted = copy.deepcopy(model)
    sam_by_hand(wanted, batches)
    called = torch.compile(model, backend="eager") if compiled else model
    train(called, optimizer_of(model, named=named), batches)
    assert differ(model, wanted) == {}
    assert int(model.bare.num_batches_tracked) == len(batches)  # type: ignore[arg-type]


@pytest.mark.fast
def test_a_failing_pass_leaves_the_statistics_of_the_first() -> None:
    model, [batch, *_] = problem()
    optimizer = optimizer_of(model)
    calls = 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        loss = nn.functional.cross_entropy(model(batch[0]), batch[1])
        if calls == 2:
            raise ValueError("in the second pass")
        loss.backward()
        return loss

    once = copy.deepcopy(model)
    once(batch[0])
    with pytest.raises(ValueError, match="second pass"):
        optimizer.step(closure)
    assert differ(model, once) == {}


@pytest.mark.fast
@pytest.mark.parametrize("face", ["engine", "attach"])
def test_an_engines_displaced_passes_and_a_probe_move_none(face: str) -> None:
    """Batch norm is refused there; instance norm's running statistics are not."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.InstanceNorm1d(4, track_running_stats=True), nn.Linear(8, 3))
    x, y = torch.randn(6, 4, 5), torch.randint(0, 3, (6, 4))

    def loss_fn(model: Any, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())

    once, start = copy.deepcopy(model), copy.deepcopy(model)
    once(x)
    if face == "engine":
        base = torch.optim.SGD(model.parameters(), lr=0.0)
        engine = lso.Engine(backend_for(model, base), lso.SAM(rho=RHO), loss_fn=loss_fn)
        engine.train_batch([(x, y)])
        assert differ(model, once) == {} and differ(model, start) != {}
    else:
        space, oracle = lso.attach(model, loss_fn, [(x, y)])
        oracle.gradient()
        lso.probes.lpf(space, oracle, sigma=0.1, draws=3)
        assert differ(model, start) == {}


@pytest.mark.parametrize("way", ["found", "unnamed", "wrapped", "given"])
def test_statistics_are_resumed(tmp_path: Path, way: str) -> None:
    """Saved, loaded, continued equals never stopped: buffers too, also of an optimizer that was given no module."""

    def start() -> tuple[Normed, Any, lso.LandscapeOptimizer]:
        model, _ = problem()
        called = torch.compile(model, backend="eager") if way == "wrapped" else model
        given = {"model": model} if way == "given" else {}
        return model, called, optimizer_of(model, named=way not in ("unnamed", "wrapped"), **given)

    _, batches = problem()
    undisturbed, called, optimizer = start()
    train(called, optimizer, batches)
    stopped, called, optimizer = start()
    train(called, optimizer, batches[:3])
    saving = Checkpointer(tmp_path)
    saving.save(optimizer, 3)
    saving.close()
    resumed, called, optimizer = start()
    loading = Checkpointer(tmp_path)
    assert loading.resume(optimizer) is not None
    loading.close()
    assert all(torch.equal(t, resumed.state_dict()[n]) for n, t in stopped.state_dict().items())
    train(called, optimizer, batches[3:])
    assert all(torch.equal(t, resumed.state_dict()[n]) for n, t in undisturbed.state_dict().items())


@pytest.mark.fast
def test_another_model_is_refused() -> None:
    model, batches = problem()
    other, _ = problem()
    with pytest.raises(lso.UserError, match=r"model=Normed does not hold parameter body\.0\.weight"):
        train(model, optimizer_of(model, model=other), batches)
