"""A user's own torch loop around LandscapeOptimizer: numbers, torch's schedulers, accelerate, state, refusals."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import elastic_lsopt as lso
from elastic_lsopt.averages.ema import EMA
from tests.laws.cover import daily

PLACES = [("plain", 1), ("ddp", 2), ("ddp", 3), ("fsdp2", 1), ("fsdp2", 2), ("fsdp2-kept", 3), ("hsdp", 4)]
FEW = [("plain", 1), ("fsdp2", 2)]
SCHEDULERS = ("CosineAnnealingLR", "OneCycleLR", "SequentialLR", "ReduceLROnPlateau")


@pytest.mark.parametrize(
    "kind,world,method,clip",
    daily(
        [place for place in PLACES if place != ("fsdp2", 1)],
        [("none", 0.0), ("sam", 0.05), ("asam", 0.0), ("lpf_sgd", 0.05)],
    ),
)
def test_user_loop_is_the_engine_is_the_paper(ranks: Any, kind: str, world: int, method: str, clip: float) -> None:
    for r in ranks(world).run("tests.cases.api:user_loop", kind=kind, method=method, clip=clip):
        assert max(r["dw"], r["dloss"], r["dengine"], r["dloss engine"]) < 1e-12, r
        assert r["passes"] == (2 if "sam" in method else 1), r


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("kind,world,rewrite", [("plain", 1, False), ("ddp", 2, False), ("fsdp2", 2, True)])
def test_torch_schedulers(ranks: Any, kind: str, world: int, rewrite: bool, name: str) -> None:
    """Learning rates and weights of a plain torch optimizer; also on groups that were rewritten in place."""
    for r in ranks(world).run("tests.cases.api:scheduled", name=name, kind=kind, rewrite=rewrite):
        ours, theirs = r["lrs"]
        assert ours == pytest.approx(theirs, rel=1e-12) and r["dw"] < 1e-12, r
        assert name == "ReduceLROnPlateau" or len(set(ours)) > 1, r


@pytest.mark.parametrize("kind,world", [("ddp", 1), ("ddp", 2), ("fsdp2", 2)])
def test_accelerate(ranks: Any, kind: str, world: int) -> None:
    for r in ranks(world).run("tests.cases.api:accelerated", kind=kind):
        assert r["dw"] < 1e-12 and r["passes"] == 2 and r["clock"] == 4, r
        if kind == "ddp" and world == 2:
            assert r["kind"] == "DistributedDataParallel"


@pytest.mark.parametrize(
    "kind,world,way",
    [
        *daily([("plain", 1), ("ddp", 2), ("fsdp2", 2), ("hsdp", 4)], ["own", "nested"]),
        ("fsdp2", 2, "flat"),
        ("fsdp2", 2, "full"),
    ],
)
def test_resume(ranks: Any, kind: str, world: int, way: str) -> None:
    """By its own state_dict and by torch.distributed.checkpoint's, into an optimizer that has not stepped."""
    for r in ranks(world).run("tests.cases.api:resumed", kind=kind, way=way):
        assert r["dw"] == 0.0 and r["clock"] == [2 * 4 * r["units"], 2], r


@pytest.mark.fast
@pytest.mark.parametrize(
    "method,update,anew", [(lso.SAM(), "", ""), (lso.LookSAM(), "", "method"), (lso.SAM(), "lamb", "update/lamb")]
)
def test_what_torchs_checkpoint_does_not_carry_is_told(
    caplog: pytest.LogCaptureFixture, method: Any, update: str, anew: str
) -> None:
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    def start() -> tuple[nn.Module, lso.LandscapeOptimizer]:
        model = nn.Linear(3, 2)
        named: Any = list(model.named_parameters())
        base = lso.UpdateOptimizer(named, update, lr=0.1) if update else torch.optim.SGD(named, lr=0.1)
        return model, lso.LandscapeOptimizer(base, method)

    def go(model: nn.Module, optimizer: lso.LandscapeOptimizer) -> None:
        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = model(torch.ones(4, 3)).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)

    (model, optimizer), (again, other) = start(), start()
    go(model, optimizer)
    set_optimizer_state_dict(again, other, optim_state_dict=get_optimizer_state_dict(model, optimizer))
    go(again, other)
    assert other.clock.steps == 2
    told = [r.getMessage() for r in caplog.records if "begins anew" in r.getMessage()]
    assert [f"what {anew} remembered" in line for line in told] == ([True] if anew else [])


@pytest.mark.parametrize("off", [None, 0.0])
@pytest.mark.parametrize("kind,world", FEW)
def test_clipping(ranks: Any, kind: str, world: int, off: float | None) -> None:
    for r in ranks(world).run("tests.cases.api:clipped", kind=kind, max_grad_norm=off):
        assert r["length"] == pytest.approx(r["reported"], rel=1e-9)
        assert r["reported"] > 0.1
    for r in ranks(world).run("tests.cases.api:clipped", kind=kind, max_grad_norm=0.01):
        assert r["length"] == pytest.approx(0.01, rel=1e-4) and r["reported"] > 0.1


# What a torch optimizer promises, on one process


def problem(method: Any = None, **more: Any) -> tuple[nn.Linear, lso.LandscapeOptimizer, Callable[[], Tensor]]:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    base = torch.optim.SGD(list(model.named_parameters()), lr=0.1, momentum=0.9)
    optimizer = lso.LandscapeOptimizer(base, method or lso.SAM(rho=0.1), **more)
    x = torch.randn(8, 4)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return loss

    return model, optimizer, closure


@pytest.mark.fast
def test_overridden_methods_keep_torchs_parameter_names() -> None:
    """torch.distributed.checkpoint and accelerate call them by keyword."""
    ours = [n for n, f in vars(lso.LandscapeOptimizer).items() if inspect.isfunction(f) and hasattr(Optimizer, n)]
    assert {"step", "zero_grad", "add_param_group", "state_dict", "load_state_dict"} <= set(ours)
    for name in set(ours) - {"__init__", "__repr__"}:
        torchs = inspect.signature(getattr(Optimizer, name)).parameters
        own = inspect.signature(getattr(lso.LandscapeOptimizer, name)).parameters
        assert list(own) == list(torchs), name
        assert all(own[n].kind == torchs[n].kind for n in own), name


@pytest.mark.fast
def test_it_is_a_torch_optimizer() -> None:
    model, optimizer, closure = problem()
    assert isinstance(optimizer, Optimizer)
    assert optimizer.param_groups is optimizer.base.param_groups and optimizer.state is optimizer.base.state
    assert optimizer.defaults["lr"] == 0.1
    assert "SAM(rho=0.1" in repr(optimizer) and "SGD" in repr(optimizer)
    loss = optimizer.step(closure)
    assert isinstance(loss, float) and loss > 0
    assert model.weight.grad is not None
    optimizer.zero_grad(set_to_none=False)
    assert not model.weight.grad.any()
    optimizer.zero_grad()
    assert model.weight.grad is None


@pytest.mark.fast
def test_hooks_run_once_a_step_around_the_update() -> None:
    model, optimizer, closure = problem()
    seen: list[tuple[str, float]] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append(("before", float(model.weight.detach()[0, 0]))))
    optimizer.register_step_post_hook(lambda *_: seen.append(("after", float(model.weight.detach()[0, 0]))))
    optimizer.register_state_dict_post_hook(lambda _, state: {**state, "mark": 1})
    start = float(model.weight.detach()[0, 0])
    optimizer.step(closure)
    assert seen == [("before", start), ("after", float(model.weight.detach()[0, 0]))]
    assert optimizer.state_dict()["mark"] == 1


@pytest.mark.fast
def test_the_closure_may_return_a_number_and_leave_zero_grad_out() -> None:
    results = []
    for plainly in (False, True):
        model, optimizer, _ = problem()
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(3))

        def short(model: nn.Module = model, x: Tensor = x) -> float:
            loss = model(x).square().mean()
            loss.backward()
            return loss.item()

        def long(short: Callable[[], float] = short, optimizer: Any = optimizer) -> float:
            optimizer.zero_grad()
            return short()

        for _ in range(3):
            optimizer.step(short if plainly else long)  # type: ignore[arg-type]
        results.append(model.weight.detach().clone())
    assert torch.equal(*results)


@pytest.mark.fast
def test_a_group_added_before_the_first_step_takes_part() -> None:
    model, optimizer, _ = problem()
    early = nn.Parameter(torch.ones(2))
    optimizer.add_param_group({"params": [("early", early)]})
    assert [p.name for p in optimizer.space.layout.parameters] == ["weight", "bias", "early"]

    def both() -> Tensor:
        optimizer.zero_grad()
        loss = (model(torch.ones(1, 4)).sum() * early.sum()).square()
        loss.backward()
        return loss

    optimizer.step(both)
    assert not torch.equal(early.detach(), torch.ones(2))


@pytest.mark.fast
def test_state_loads_into_the_base_alone_and_from_it() -> None:
    """A plain torch optimizer's state leaves the clock alone; that of our base holds it."""
    model, optimizer, closure = problem()
    optimizer.step(closure)
    plain = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    plain.step()
    for state, clock in ((plain.state_dict(), (0, 0)), (optimizer.base.state_dict(), (1, 1))):
        _, other, _ = problem()
        other.load_state_dict(state)
        loaded = other.state_dict()
        assert torch.equal(loaded["state"][0]["momentum_buffer"], state["state"][0]["momentum_buffer"])
        assert loaded["landscape"]["clock"] == clock


def no_closure(optimizer: Any, model: Any, closure: Any) -> None:
    optimizer.step()


def two_closures(optimizer: Any, model: Any, closure: Any) -> None:
    optimizer.step([closure, closure])


def no_number(optimizer: Any, model: Any, closure: Any) -> None:
    optimizer.step(lambda: closure() and None)


def not_callable(optimizer: Any, model: Any, closure: Any) -> None:
    optimizer.step(3)


def loss_alone(optimizer: Any, model: Any, closure: Any) -> None:
    class Asks:
        parts = 1

        def init(self, space: Any) -> dict[str, Any]:
            return {}

        def gradient(self, space: Any, oracle: Any, state: Any) -> Any:
            return oracle.loss()

    lso.LandscapeOptimizer(optimizer.base, Asks()).step(closure)


@pytest.mark.fast
@pytest.mark.parametrize(
    "use,says",
    [
        (no_closure, "step() needs a closure"),
        (two_closures, "the method takes 1 part(s), step() got 2 closure(s)"),
        (no_number, "the closure returned None"),
        (not_callable, "step() takes a closure or a list of closures, got int"),
        (loss_alone, "a closure runs backward too and cannot give the loss alone"),
    ],
)
def test_wrong_steps(use: Callable[..., None], says: str) -> None:
    model, optimizer, closure = problem()
    before = model.weight.detach().clone()
    with pytest.raises(lso.UserError) as caught:
        use(optimizer, model, closure)
    assert str(caught.value).startswith(says) and "\n" not in str(caught.value)
    assert torch.equal(before, model.weight)
    assert optimizer.step(closure) > 0


@pytest.mark.fast
def test_a_closure_that_empties_the_models_gradient_between_parts_is_refused() -> None:
    model, optimizer, closure = problem(lso.LPFSGD(parts=2, alpha=1.0))

    def wrong() -> Tensor:
        model.zero_grad()
        loss = model(torch.ones(1, 4)).square().mean()
        loss.backward()
        return loss

    with pytest.raises(lso.UserError, match="threw away the gradient of the one before"):
        optimizer.step([closure, wrong])
    assert optimizer.step([closure, closure]) > 0


@pytest.mark.fast
def test_refused_at_construction() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(lso.UserError, match="base is a Linear; give a torch optimizer"):
        lso.LandscapeOptimizer(model, lso.SAM())  # type: ignore[arg-type]
    deepspeeds = type("DeepSpeedZeroOptimizer", (torch.optim.SGD,), {"__module__": "deepspeed.runtime.zero"})
    with pytest.raises(lso.UserError, match=r"DeepSpeedZeroOptimizer.*lso\.initialize"):
        lso.LandscapeOptimizer(deepspeeds(model.parameters(), lr=0.1), lso.SAM())
    half = lso.LandscapeOptimizer(torch.optim.SGD(nn.Linear(2, 2).half().parameters(), lr=0.1), lso.SAM())
    with pytest.raises(lso.UserError, match=r"fp16 parameters need loss scaling.*bf16"):
        half.step(lambda: torch.zeros(()))
    unnamed = lso.LandscapeOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), lso.ASAM())
    with pytest.raises(lso.UserError, match=r"named_parameters\(\)"):
        unnamed.step(lambda: torch.zeros(()))
    with pytest.raises(lso.UserError, match=r"a number with alpha: 1.*give total_samples to the optimizer"):
        problem(lso.LPFSGD(parts=1))


@pytest.mark.fast
def test_a_loss_that_is_not_finite_is_skipped() -> None:
    model, optimizer, closure = problem()
    optimizer.step(closure)
    before = model.weight.detach().clone()
    optimizer.step(lambda: closure() * float("nan"))
    assert optimizer.last_step and optimizer.last_step.skipped
    assert torch.equal(before, model.weight)
    optimizer.step(closure)
    assert not optimizer.last_step.skipped and not torch.equal(before, model.weight)


@pytest.mark.fast
@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_one_process_goes_on_after_an_exception_in_any_pass(error: type[BaseException]) -> None:
    """The weights are the only copy, and right again: the step is as if the one that failed had never begun."""
    for failing in (1, 2):
        (model, optimizer, closure), (plain, other, wanted) = problem(), problem()
        passes = 0

        def interrupted(closure: Any = closure, failing: int = failing) -> Tensor:
            nonlocal passes
            passes += 1
            loss = closure()
            if passes == failing:
                raise error("on purpose")
            return loss

        with pytest.raises(error):
            optimizer.step(interrupted)
        assert optimizer.space.in_sync and torch.equal(model.weight, plain.weight)
        optimizer.step(closure)
        other.step(wanted)
        assert torch.equal(model.weight, plain.weight)


@pytest.mark.fast
@pytest.mark.parametrize("way", ["freeze", "add_param_group", "load"])
def test_nothing_is_rebuilt_where_the_weights_are_moved(way: str) -> None:
    """The block's end would take back what is done inside it, and no longer knows that it must."""
    model, optimizer, closure = problem(keep=[EMA()])
    for _ in range(2):
        optimizer.step(closure)
    state, before = optimizer.state_dict(), model.weight.detach().clone()
    with optimizer.averaged("ema"):
        if way == "freeze":
            model.bias.requires_grad_(False)
        elif way == "add_param_group":
            optimizer.add_param_group({"params": [("late", nn.Parameter(torch.ones(2)))]})
        with pytest.raises(lso.StaleWeights, match=r"where the weights are moved.*when the block has ended"):
            _ = optimizer.load_state_dict(state) if way == "load" else optimizer.step(closure)
    assert torch.equal(model.weight, before)
    optimizer.step(closure)
    assert optimizer.clock.steps == 3


@pytest.mark.fast
def test_what_a_parameter_held_before_it_was_added_is_no_gradient() -> None:
    """As in torch, where the closure's zero_grad empties it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    plain = copy.deepcopy(model)
    optimizer = lso.LandscapeOptimizer(torch.optim.SGD(model[1].parameters(), lr=0.1), lso.Plain())
    theirs = torch.optim.SGD(plain[1].parameters(), lr=0.1)

    def of(net: nn.Module, base: Optimizer) -> Callable[[], Tensor]:
        def closure() -> Tensor:
            base.zero_grad()
            loss = net(torch.ones(2, 3)).square().mean()
            loss.backward()
            return loss

        return closure

    for late in (False, True):
        if late:
            optimizer.add_param_group({"params": list(model[0].parameters())})
            theirs.add_param_group({"params": list(plain[0].parameters())})
        for _ in range(2):
            optimizer.step(of(model, optimizer))
            theirs.step(of(plain, theirs))
    assert torch.equal(model[0].weight, plain[0].weight)  # type: ignore[arg-type]
