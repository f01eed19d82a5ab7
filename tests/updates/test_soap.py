"""SOAP: against its authors' algorithm in an independent library, its geometry, its memory, and who keeps what."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_optimizer
import torch
from torch import Tensor, nn

import elastic_lsopt as lso
from tests.laws.cover import full_but, joined
from tests.oracles import updates
from tests.updates.test_param_groups import batch, engine_of, flat, halves, net, squares

LAYOUTS = [("plain", 1), ("ddp", 2), ("fsdp2", 3), ("hsdp", 4), ("fsdp2", 2)]


def square(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Its gradients have full rank, so that rounding decides on no direction."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5)).to(dtype)


def pair(i: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(i)
    return torch.randn(32, 5, generator=draw).to(dtype), torch.randn(32, 5, generator=draw).to(dtype)


@pytest.mark.fast
@pytest.mark.parametrize("options", [{"every": 10}, {"every": 2}, {"most": 0}], ids=str)
@pytest.mark.parametrize("authors", ["library", "loop"])
def test_the_authors_algorithm(options: dict[str, int], authors: str) -> None:
    mine, theirs = square(), square()
    base = lso.UpdateOptimizer(mine.parameters(), "soap", lr=3e-3, weight_decay=0.01, **options)
    if authors == "library":
        named = {"every": "precondition_frequency", "most": "max_precondition_dim"}
        own = {named[k]: max(v, 1) for k, v in options.items()}
        other: Any = pytorch_optimizer.SOAP(theirs.parameters(), lr=3e-3, **own)
    else:
        other = updates.SOAP(theirs.parameters(), lr=3e-3, weight_decay=0.01, **options)
    engine, before = engine_of(mine, base), flat(mine)
    for i in range(8):
        engine.train_batch([pair(i)])
        other.zero_grad()
        squares(theirs, pair(i)).backward()
        other.step()
    assert float((flat(mine) - before).abs().max()) > 0.01
    assert float((flat(mine) - flat(theirs)).abs().max()) < 2e-6


@pytest.mark.fast
def test_a_convolution_turns_each_of_its_sides() -> None:
    def model() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(27, 3)).double()

    mine, theirs = model(), model()
    x, y = torch.randn(16, 2, 4, 4).double(), torch.randn(16, 3).double()
    options = {"lr": 0.01, "weight_decay": 0.1, "most": 5}
    engine = engine_of(mine, lso.UpdateOptimizer(mine.parameters(), "soap", **options))
    other = updates.SOAP(theirs.parameters(), **options)  # type: ignore[arg-type]
    for _ in range(4):
        engine.train_batch([(x, y)])
        other.zero_grad()
        squares(theirs, (x, y)).backward()
        other.step()
    assert float((flat(mine) - flat(theirs)).abs().max()) < 1e-6
    sides = {n: p.layout.parameters for n, v in engine.families["update/soap"].state_dict().items() if (p := _space(v))}
    assert [p.shape for p in sides["gram2"]] == [(2, 2)] and [p.shape for p in sides["gram1"]] == [(2, 2)]


def _space(value: Any) -> Any:
    return getattr(value, "space", None)


@pytest.mark.fast
def test_what_rotates_a_matrix_rotates_its_steps() -> None:
    """W -> U W V turns the iterates alike: Adam's steps are taken in axes that the matrix brings with it."""
    torch.manual_seed(1)
    U, V = (torch.linalg.qr(torch.randn(4, 4).double())[0] for _ in range(2))
    W, A = (torch.randn(4, 4).double() for _ in range(2))
    A = torch.eye(4) + A / 10

    class Rotated(nn.Module):
        def __init__(self, u: Tensor, v: Tensor) -> None:
            super().__init__()
            self.u, self.v, self.w = u, v, nn.Parameter(u @ W @ v)

        def forward(self, x: Tensor) -> Tensor:
            return (A @ (self.u.T @ self.w @ self.v.T) - x).square().mean()

    ends = []
    for u, v in ((torch.eye(4).double(), torch.eye(4).double()), (U, V)):
        model = Rotated(u, v)
        base = lso.UpdateOptimizer(model.parameters(), "soap", lr=0.01, every=2)
        engine = lso.Engine.of(model, base, loss_fn=lambda model, x: model(x))
        for i in range(6):
            engine.train_batch([torch.randn(1, 4, 4, generator=torch.Generator().manual_seed(i)).double()])
        ends.append(u.T @ model.w.detach() @ v.T)
    assert float((ends[0] - W).abs().max()) > 0.02
    assert float((ends[0] - ends[1]).abs().max()) < 1e-5


EVERY_DAY = [("ddp", 2, "soap"), ("hsdp", 4, "soap_often")]


@pytest.mark.parametrize(
    "kind,world,update", full_but(EVERY_DAY, LAYOUTS, ["soap", "soap_often", "soap_none"]), ids=joined
)
def test_on_shards_in_fp64(ranks: Any, kind: str, world: int, update: str) -> None:
    """The loop turns m with bases that are orthogonal to fp32's rounding, in each step; ours turns it seldom."""
    case = "tests.cases.updates:reference"
    out = ranks(world).run(case, kind=kind, update=update, dtype="fp64", last=2, clip=0.5, units=5, method="sam")
    assert all(r["dw"] < 2e-6 and r["dloss"] < 2e-6 for r in out), out


ZERO = [(f"zero{stage}", world) for stage in (0, 1, 2, 3) for world in (1, 2, 3)]


@pytest.mark.parametrize("kind,world", full_but([("zero1", 2), ("zero3", 3)], ZERO))
def test_under_zero(ranks: Any, kind: str, world: int) -> None:
    """Short sides alone, of which the gradient has the full rank: elsewhere rounding in fp32 chooses the basis."""
    for r in ranks(world).run("tests.cases.updates:reference", kind=kind, update="soap_short"):
        assert r["dw"] < 1e-5, r


@pytest.mark.parametrize(("kind", "world"), [("ddp", 2), ("zero2", 3)])
def test_its_memory_is_what_it_says(ranks: Any, kind: str, world: int) -> None:
    """2 of each element, and 2 (r^2 + c^2) of a matrix, over all ranks once; vectors' are where the weights are."""
    out = ranks(world).run("tests.cases.updates:soap_memory", kind=kind)
    shapes = [(13, 7), (11, 13), (3, 11)]
    assert sum(r["owned"] for r in out) == sum(2 * (r * r + c * c) + 2 * r * c for r, c in shapes)
    assert sum(r["plain"] for r in out) == 2 * (13 + 11 + 11 + 11 + 3 + 1) * (world if kind == "ddp" else 1)
    assert all(r["owned"] > 0 for r in out)


@pytest.mark.fast
def test_groups_that_differ_in_more_than_rate_and_decay_are_refused() -> None:
    model = net()
    first, second = halves(model)
    groups = [{"params": first, "weight_decay": 0.1}, {"params": second, "lr": 0.1}]
    engine_of(model, lso.UpdateOptimizer(groups, "soap", lr=0.01)).train_batch([batch(0)])
    other = net()
    first, second = halves(other)
    groups = [{"params": first, "eps": 1e-3}, {"params": second}]
    with pytest.raises(lso.UserError, match="update soap works on all its parameters together") as caught:
        engine_of(other, lso.UpdateOptimizer(groups, "soap", lr=0.01))
    assert "\n" not in str(caught.value)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"betas": 0.9}, "betas=0.9 must be two numbers"), ({"every": 0}, "every=0 must be a whole number >= 1"),
        ({"most": -1}, "most=-1 must be a whole number >= 0"), ({"eps": -1.0}, "eps=-1.0 must be a number >= 0"),
    ],
    ids=str,
)  # fmt: skip
def test_values_out_of_range(options: dict[str, Any], says: str) -> None:
    with pytest.raises(lso.UserError) as caught:
        lso.UpdateOptimizer(net().parameters(), "soap", lr=0.1, **options)
    assert says in str(caught.value)


@pytest.mark.fast
def test_what_is_unfrozen_begins_with_a_basis_of_its_own() -> None:
    """The others keep theirs, and their place in the count of steps."""
    from tests.updates.test_param_groups import closure_of

    model = net()
    model[2].requires_grad_(False)
    base = lso.UpdateOptimizer(model.named_parameters(), "soap", lr=0.01)
    optimizer = lso.LandscapeOptimizer(base, lso.Plain(), model=model)
    for i in range(3):
        optimizer.step(closure_of(model, optimizer, i))
    had: Any = dict(optimizer.families["update/soap"].state_dict())
    kept = had["basis0"].tensors[0].clone()
    model[2].requires_grad_(True)
    before = model[2].weight.detach().clone()
    optimizer.step(closure_of(model, optimizer, 3))
    now: Any = optimizer.families["update/soap"].state_dict()
    assert torch.equal(now["basis0"].tensors[0], kept) and torch.equal(model[2].weight, before)
    assert now["step/0.weight"] == 3 and now["step/2.weight"] == 0
    optimizer.step(closure_of(model, optimizer, 4))
    assert not torch.equal(model[2].weight, before)


@pytest.mark.fast
def test_its_state_is_in_a_checkpoint(tmp_path: Path) -> None:
    model, again = net(), net()
    bases = [lso.UpdateOptimizer(m.parameters(), "soap", lr=0.01, every=2) for m in (model, again)]
    engine, other = (engine_of(m, base) for m, base in zip((model, again), bases, strict=True))
    for i in range(5):
        engine.train_batch([batch(i)])
    lso.save(engine, tmp_path)
    lso.load(other, tmp_path)
    for i in range(5, 8):
        engine.train_batch([batch(i)])
        other.train_batch([batch(i)])
    assert torch.equal(flat(model), flat(again))
