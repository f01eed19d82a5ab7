"""Param groups of an `UpdateOptimizer`: each keeps its own hyper-parameters, and no state is lost by rearranging them.

Wanted values come from torch's own optimizers and from loops over whole parameters, in fp64.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import elastic_lsopt as lso
from elastic_lsopt.updates.torch_update import ELEMENT_WISE
from tests.cases.updates import OPTIONS, sampling_loss
from tests.oracles import updates

pytestmark = pytest.mark.fast

Groups = list[dict[str, Any]]


def net(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    draw = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=draw) / 2)
    return model


def batch(i: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(100 + i)
    return torch.randn(8, 5, generator=draw).to(dtype), torch.randn(8, 3, generator=draw).to(dtype)


def squares(model: nn.Module, pair: tuple[Tensor, Tensor]) -> Tensor:
    return ((model(pair[0]) - pair[1]) ** 2).mean()


def engine_of(model: nn.Module, base: torch.optim.Optimizer, **options: Any) -> lso.Engine:
    return lso.Engine.of(model, base, loss_fn=squares, **options)


def ours(model: nn.Module, base: torch.optim.Optimizer, steps: Iterable[int] = range(6)) -> Tensor:
    engine = engine_of(model, base)
    for i in steps:
        engine.train_batch([batch(i, next(model.parameters()).dtype)])
    return flat(model)


def loop(model: nn.Module, base: torch.optim.Optimizer, steps: Iterable[int] = range(6)) -> Tensor:
    for i in steps:
        base.zero_grad()
        squares(model, batch(i, next(model.parameters()).dtype)).backward()
        base.step()
    return flat(model)


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().double().reshape(-1) for p in model.parameters()])


def halves(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    every = list(model.parameters())
    return every[:2], every[2:]


ADAMW = [{"betas": (0.5, 0.9), "eps": 1e-3, "weight_decay": 0.1}, {"betas": (0.9, 0.99), "lr": 0.02}]
SGD = [{"momentum": 0.5}, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01}]
ADAGRAD = [{"lr_decay": 0.1}, {"weight_decay": 0.01}]
RMSPROP = [{"momentum": 0.5, "centered": True}, {"alpha": 0.9, "weight_decay": 0.01}]
ASGD = [{"t0": 2.0, "lambd": 0.01}, {"alpha": 0.5, "weight_decay": 0.01}]
RPROP = [{"etas": (0.4, 1.3), "lr": 0.02}, {"step_sizes": (1e-4, 0.015)}]
NADAM = [{"momentum_decay": 0.1, "decoupled_weight_decay": True, "weight_decay": 0.1}, {"betas": (0.5, 0.9)}]
OTHERS = [{"weight_decay": 0.1, "eps": 1e-3}, {"lr": 0.02}]
TORCHS = {
    "AdamW": ADAMW, "SGD": SGD, "Adam": ADAMW, "Adagrad": ADAGRAD, "RMSprop": RMSPROP, "ASGD": ASGD, "Rprop": RPROP,
    "NAdam": NADAM, "RAdam": OTHERS, "Adamax": OTHERS, "Adadelta": OTHERS,
}  # fmt: skip


def test_each_element_wise_class_is_tried() -> None:
    assert {kind.__name__ for kind in ELEMENT_WISE} == {*TORCHS}


@pytest.mark.parametrize(("kind", "said"), TORCHS.items())
def test_groups_of_a_torch_class_are_torchs(kind: str, said: Groups) -> None:
    mine, theirs = net(), net()
    given = [{"params": p, **own} for p, own in zip(halves(mine), said, strict=True)]
    wanted = [{"params": p, **own} for p, own in zip(halves(theirs), said, strict=True)]
    whole: dict[str, Any] = {"initial_accumulator_value": 0.3} if kind == "Adagrad" else {}
    base = lso.UpdateOptimizer(given, kind, lr=0.01, **whole)
    decay = {} if kind == "Rprop" else {"weight_decay": 0.0}
    assert torch.equal(ours(mine, base), loop(theirs, getattr(torch.optim, kind)(wanted, lr=0.01, **whole, **decay)))


def test_a_decay_that_a_class_does_not_have_is_refused() -> None:
    with pytest.raises(lso.UserError, match=r"rprop has no weight decay.* set it to 0"):
        lso.UpdateOptimizer(net().parameters(), "Rprop", lr=0.01, weight_decay=0.1)


def test_torchs_own_muon_is_refused_by_the_name_of_ours() -> None:
    with pytest.raises(lso.UserError, match=r"torch's Muon makes a shard orthogonal.*'muon', ours"):
        lso.UpdateOptimizer(net().parameters(), torch.optim.Muon, lr=0.01)


def lars(model: nn.Module, first: dict[str, Any], second: dict[str, Any]) -> torch.optim.Optimizer:
    of = {"lr": 0.1, "weight_decay": 1e-3}
    halved = zip(halves(model), (first, second), strict=True)
    return updates.Both(*(updates.LARS(p, **of, **own) for p, own in halved))


@pytest.mark.parametrize("how", ["name", "class", "instance", "moved later"])
def test_groups_of_an_update_have_their_own_hyperparameters(how: str) -> None:
    first, second = {"momentum": 0.9, "trust": 0.1}, {"momentum": 0.0, "trust": 0.5}
    mine, theirs = net(), net()
    given = {"name": "lars", "class": lso.LARS, "moved later": "lars"}
    groups: Groups = []
    for params, own in zip(halves(mine), (first, second), strict=True):
        groups.append({"params": params, "update": given.get(how) or lso.LARS(**own)})
        groups[-1] |= own if how in ("name", "class") else {}
    base = lso.UpdateOptimizer(groups, lr=0.1, weight_decay=1e-3)
    if how == "moved later":
        for group, own in zip(base.param_groups, (first, second), strict=True):
            group.update(own)
    assert torch.allclose(ours(mine, base), loop(theirs, lars(theirs, first, second)), rtol=0, atol=1e-12)


def test_groups_that_differ_in_rate_alone_share_their_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    base = lso.UpdateOptimizer([{"params": p, "lr": 0.01 * i} for i, p in enumerate(halves(model))], "lamb", lr=0.01)
    engine, counted = engine_of(model, base), []
    sums: Callable[..., Any] = engine.backend.sum_pieces_
    monkeypatch.setattr(engine.backend, "sum_pieces_", lambda v: counted.append(v) or sums(v))
    engine.train_batch([batch(0)])
    base.param_groups[1]["eps"] = 1e-3
    one = len(counted)
    engine.train_batch([batch(1)])
    assert len(counted) - one == one + 1


WRONG: list[tuple[Any, dict[str, Any], str]] = [
    ("lamb", {"beta": (0.5, 0.5)}, "no update here (lamb) has a hyper-parameter beta"),
    ("AdamW", {"momentum": 0.9}, "no update here (adamw) has a hyper-parameter momentum"),
    ("lamb", {"betas": 0.9}, "betas=0.9 must be two numbers >= 0 and < 1"),
    ("lamb", {"betas": (0.9, 0.9, 0.9)}, "must be two numbers"),
    ("lambb", {}, "unknown update 'lambb'; did you mean 'lamb'?"),
    ("LBFGS", {}, "may not work element by element"),
    (torch.nn.Linear, {}, "is neither an Update"),
    ([{"update": "lars", "trusst": 1.0}], {}, "update 'lars' has no hyper-parameter 'trusst'; it has: momentum, trust"),
]


@pytest.mark.parametrize(("update", "options", "says"), WRONG, ids=lambda v: str(v)[:30])
def test_a_wrong_option_is_one_line(update: Any, options: dict[str, Any], says: str) -> None:
    model = net()
    groups = [{**own, "params": model.parameters()} for own in update] if isinstance(update, list) else None
    with pytest.raises(lso.UserError) as caught:
        lso.UpdateOptimizer(groups or model.parameters(), "lamb" if groups else update, lr=0.1, **options)
    assert says in str(caught.value) and "\n" not in str(caught.value)


# -- freezing and unfreezing -----------------------------------------------------------------------------------------


def closure_of(model: nn.Module, optimizer: Any, i: int) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = squares(model, batch(i))
        loss.backward()
        return loss

    return closure


def test_what_is_unfrozen_begins_and_others_go_on() -> None:
    """torch's AdamW and our LARS: the parameters that trained before keep moments and count, the new begin at one."""
    mine, theirs = net(), net()
    bases: list[Any] = []
    for model, make in ((mine, None), (theirs, updates.LARS)):
        first, second = halves(model)
        for p in first:
            p.requires_grad_(False)
        of_lars, of_adamw = [first[0], second[0]], [first[1], second[1]]
        if make is None:
            groups: Groups = [
                {"params": [of_lars[0]], "update": "lars", "trust": 0.1},
                {"params": of_adamw, "update": "AdamW", "lr": 0.01},
                {"params": [of_lars[1]], "update": "lars", "trust": 0.1},
            ]
            base = lso.UpdateOptimizer(groups, lr=0.1)
            bases.append(lso.LandscapeOptimizer(base, lso.Plain(), model=model))
        else:
            parts = (
                make(of_lars, lr=0.1, momentum=0.9, trust=0.1, weight_decay=0.0),
                torch.optim.AdamW(of_adamw, lr=0.01, weight_decay=0.0),
            )
            bases.append(updates.Both(*parts))
    for i in range(6):
        if i == 3:
            for model in (mine, theirs):
                model.requires_grad_(True)
        bases[0].step(closure_of(mine, bases[0], i))
        bases[1].zero_grad()
        squares(theirs, batch(i)).backward()
        bases[1].step()
        assert torch.allclose(flat(mine), flat(theirs), rtol=0, atol=1e-12), i


def test_all_parameters_of_an_update_may_be_frozen() -> None:
    model = net()
    matrices, rest = [[p for p in model.parameters() if (p.dim() == 2) == two] for two in (True, False)]
    base = lso.UpdateOptimizer([{"params": matrices, "update": "muon", "lr": 0.02}, {"params": rest}], "AdamW", lr=0.01)
    optimizer = lso.LandscapeOptimizer(base, lso.Plain(), model=model)
    optimizer.step(closure_of(model, optimizer, 0))
    for p in rest:
        p.requires_grad_(False)
    before = [p.clone() for p in model.parameters()]
    optimizer.step(closure_of(model, optimizer, 1))
    moved = [not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)]
    assert moved == [True, False, True, False]


# -- state -----------------------------------------------------------------------------------------------------------


def two(model: nn.Module, first: dict[str, Any], second: dict[str, Any], turned: bool = False) -> lso.UpdateOptimizer:
    groups = [{"params": p, **own} for p, own in zip(halves(model), (first, second), strict=True)]
    return lso.UpdateOptimizer(groups[::-1] if turned else groups, lr=0.1)


def moments(engine: lso.Engine) -> dict[str, Tensor]:
    """What updates remember, by parameter."""
    out = {}
    for name, family in engine.families.items():
        for key, value in family.state_dict().items() if name.startswith("update/") else ():
            if not isinstance(value, int | float):
                layout = value.space.layout
                for piece, t in zip(layout.pieces, value.tensors, strict=True):
                    out[f"{name}/{key}/{layout.parameters[piece.parameter].name}"] = t.clone()
    return out


LARS_A, LARS_B = {"update": "lars", "momentum": 0.9}, {"update": "lars", "momentum": 0.5}
OTHERS = {
    "the same": (LARS_A, LARS_B, False, 4), "turned": (LARS_A, LARS_B, True, 4), "equal": (LARS_A, LARS_A, False, 4),
    "half moved to AdamW": (LARS_A, {"update": "AdamW"}, False, 2),
}  # fmt: skip


@pytest.mark.parametrize("change", OTHERS)
def test_a_resume_keeps_what_the_new_groups_still_have(change: str, tmp_path: Path) -> None:
    """Whatever the file now says of groups: a parameter whose update is the same keeps its momentum."""
    model = net()
    engine = engine_of(model, two(model, LARS_A, LARS_B))
    for i in range(3):
        engine.train_batch([batch(i)])
    lso.save(engine, tmp_path)
    had = moments(engine)
    first, second, turned, kept = OTHERS[change]
    again = net()
    resumed = engine_of(again, two(again, first, second, turned))
    assert lso.load(resumed, tmp_path, hyperparameters=False) is not None
    found = moments(resumed)
    assert len(had) == 4 and all(torch.equal(found[key], had[key]) for key in had.keys() & found.keys())
    assert len(had.keys() & found.keys()) == kept
    resumed.train_batch([batch(3)])
    if change == "the same":
        engine.train_batch([batch(3)])
        assert torch.equal(flat(again), flat(model))


def test_an_adamw_checkpoint_leaves_an_update_its_own_values(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = net()
    engine = engine_of(model, torch.optim.AdamW(model.parameters(), lr=0.1, eps=1e-8))
    engine.train_batch([batch(0)])
    lso.save(engine, tmp_path)
    again = net()
    base = lso.UpdateOptimizer(again.parameters(), "lamb", lr=0.5)
    resumed = engine_of(again, base)
    lso.load(resumed, tmp_path)
    assert torch.equal(flat(again), flat(model)) and base.param_groups[0]["eps"] == 1e-6 and not base.state
    assert base.param_groups[0]["lr"] == 0.5
    assert "begins anew" in caplog.text and "keeps its own hyper-parameters" in caplog.text


def test_its_state_is_plain_data(tmp_path: Path) -> None:
    """`torch.load` takes it with its default, which unpickles nothing but tensors and plain values."""
    model = net()
    base = lso.UpdateOptimizer(model.named_parameters(), "lamb", lr=0.01)
    optimizer = lso.LandscapeOptimizer(base, lso.SAM(rho=0.05), model=model)
    for i in range(2):
        optimizer.step(closure_of(model, optimizer, i))
    torch.save(optimizer.state_dict(), tmp_path / "o.pt")
    again = copy.deepcopy(model)
    other = lso.LandscapeOptimizer(
        lso.UpdateOptimizer(again.named_parameters(), "lamb", lr=0.9), lso.SAM(rho=0.05), model=again
    )
    other.load_state_dict(torch.load(tmp_path / "o.pt"))
    for one, net_ in ((optimizer, model), (other, again)):
        one.step(closure_of(net_, one, 2))
    assert torch.equal(flat(model), flat(again))
    base = lso.UpdateOptimizer(again.named_parameters(), "lars", lr=0.9)
    with pytest.raises(lso.UserError, match="was saved with update='lamb' and has 'lars' here"):
        base.load_state_dict(torch.load(tmp_path / "o.pt"))


# -- what users do around it -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("update", ["AdamW", "SGD"])
def test_bf16_parameters_step_as_torchs(update: str) -> None:
    mine, theirs = net(torch.bfloat16), net(torch.bfloat16)
    base = lso.UpdateOptimizer(mine.parameters(), update, lr=0.05)
    wanted = getattr(torch.optim, update)(theirs.parameters(), lr=0.05, weight_decay=0.0)
    assert torch.equal(ours(mine, base), loop(theirs, wanted))


def test_a_schedule_of_momenta() -> None:
    model = net()
    base = lso.UpdateOptimizer(model.parameters(), "AdamW", lr=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(base, max_lr=0.1, total_steps=10)
    other = net()
    theirs = torch.optim.AdamW(other.parameters(), lr=0.01, weight_decay=0.0)
    wanted = torch.optim.lr_scheduler.OneCycleLR(theirs, max_lr=0.1, total_steps=10)
    engine = engine_of(model, base)
    for i in range(5):
        engine.train_batch([batch(i)])
        schedule.step()
        loop(other, theirs, [i])
        wanted.step()
    assert torch.equal(flat(model), flat(other))


def test_a_step_by_hand_is_refused() -> None:
    model = net()
    base = lso.UpdateOptimizer(model.parameters(), "lamb", lr=0.01)
    engine = engine_of(model, base)
    engine.train_batch([batch(0)])
    with pytest.raises(lso.UserError, match="is stepped by what holds it"):
        base.step()


def test_a_step_at_an_average_is_refused() -> None:
    model = net()
    engine = engine_of(model, torch.optim.SGD(model.parameters(), lr=0.1), keep=[lso.EMA(decay=0.5)])
    for i in range(3):
        engine.train_batch([batch(i)])
    before = flat(model)
    with engine.averaged(), pytest.raises(lso.StaleWeights, match="take it back"):
        engine.train_batch([batch(3)])
    assert torch.equal(flat(model), before)


def test_a_gradient_that_was_written_in_place_is_clipped_by_its_own_length() -> None:
    class Tenfold:
        parts = 1

        def init(self, space: Any) -> dict[str, Any]:
            return {}

        def gradient(self, space: Any, oracle: Any, state: Any) -> Any:
            return oracle.gradient().mul_(10.0)

    mine, theirs = net(), net()
    base = torch.optim.SGD(mine.parameters(), lr=0.1)
    engine = engine_of(mine, base, method=Tenfold(), max_grad_norm=0.5)
    engine.train_batch([batch(0)])
    squares(theirs, batch(0)).backward()
    own = list(theirs.parameters())
    length = 10 * math.sqrt(sum(float(p.grad.square().sum()) for p in own if p.grad is not None))
    assert length > 0.5 and engine.last_step is not None and engine.last_step.gradient_norm == pytest.approx(length)
    with torch.no_grad():
        for p in own:
            assert p.grad is not None
            p.sub_(10 * p.grad * 0.5 / length, alpha=0.1)
    assert torch.allclose(flat(mine), flat(theirs), rtol=0, atol=1e-6)


@pytest.mark.parametrize("update", ["soap", "sophia_g", "sassha", "adaptive_memory_adamw", "schedule_free_adamw"])
def test_bf16_parameters_step_near_fp32s(update: str) -> None:
    """Of updates of ours, whose own vectors are fp32 beside weights in bf16."""
    ends = []
    for dtype in (torch.float32, torch.bfloat16):
        model = net(torch.bfloat16).to(dtype)
        start, (name, options) = flat(model), OPTIONS[update]
        engine = lso.Engine.of(model, lso.UpdateOptimizer(model.parameters(), name, **options), loss_fn=sampling_loss())
        for i in range(4):
            x, y = batch(i, dtype)
            engine.train_batch([(x, y.argmax(1))])
        ends.append(flat(model) - start)
    assert float((ends[0] - ends[1]).norm() / ends[0].norm()) < 0.4
