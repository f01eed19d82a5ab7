"""A saved state goes on by the names of its parameters, whichever are trained or named when it is loaded.

Wanted values come from torch's own optimizers, the authors' code and loops that know of one layer alone, in fp64.
"""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import elastic_lsopt as lso
from elastic_lsopt.averages.ema import EMA
from elastic_lsopt.updates.torch_update import ELEMENT_WISE
from tests.cases import updates

OURS = ["lars", "lamb", "schedule_free_sgd", "schedule_free_adamw", "adaptive_memory_adamw", "soap"]
TORCHS = sorted(kind.__name__ for kind in ELEMENT_WISE)


def two_layers(trained: tuple[int, ...] = (0, 1)) -> nn.Sequential:
    """Of the same shape, so that the state of one would fit the other."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).double()
    return train_only(model, trained)


def train_only(model: nn.Sequential, trained: tuple[int, ...]) -> nn.Sequential:
    for i, layer in enumerate(model):
        layer.requires_grad_(i in trained)
    model.zero_grad()
    return model


def loss_of(model: nn.Module) -> Tensor:
    return (model(torch.tensor([[1.0, 0.5], [-0.5, 0.25]]).double()) - 1).square().mean()


def step(optimizer: lso.LandscapeOptimizer, model: nn.Module, steps: int = 1) -> None:
    for _ in range(steps):

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(model)
            loss.backward()
            return loss

        optimizer.step(closure)


def plainly(base: torch.optim.Optimizer, model: nn.Module, steps: int = 1) -> None:
    for _ in range(steps):
        base.zero_grad()
        loss_of(model).backward()
        base.step()


def options(update: str) -> tuple[str, dict[str, Any]]:
    if update in updates.OPTIONS:
        return updates.OPTIONS[update]
    more: dict[str, dict[str, Any]] = {"SGD": {"momentum": 0.9}, "AdamW": {"weight_decay": 0.0}}
    return update, {"lr": 0.01, **more.get(update, {})}


def theirs(update: str, model: nn.Module) -> torch.optim.Optimizer:
    """Of what is trainable now."""
    if update in updates.OPTIONS:
        return updates.theirs(update, model)
    return getattr(torch.optim, update)([p for p in model.parameters() if p.requires_grad], **options(update)[1])


def ours(update: str, model: nn.Module, *, names: bool = True, **more: Any) -> lso.LandscapeOptimizer:
    name, said = options(update)
    base = lso.UpdateOptimizer(model.named_parameters() if names else model.parameters(), name, **said)
    return lso.LandscapeOptimizer(base, lso.Plain(), **more)


def through_a_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def furthest(a: nn.Module, b: nn.Module) -> float:
    return max(float((p - q).detach().abs().max()) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def tolerance(update: str) -> float:
    return 1e-6 if update == "soap" else 1e-12  # its decompositions are in fp32


@pytest.mark.parametrize("update", [*OURS, *TORCHS])
def test_the_next_block_begins_anew_after_a_resume(update: str, caplog: pytest.LogCaptureFixture) -> None:
    """Layer 0 was trained and saved; who trains layer 1 then has no memory of layer 0's gradients."""
    model = two_layers((0,))
    optimizer = ours(update, model)
    step(optimizer, model, 3)
    saved = through_a_file(optimizer.state_dict())
    plain = copy.deepcopy(model)
    again = train_only(copy.deepcopy(model), (1,))
    other = ours(update, again)
    other.load_state_dict(saved)
    step(other, again, 3)
    plainly(theirs(update, train_only(plain, (1,))), plain, 3)
    assert furthest(again, plain) < tolerance(update)
    assert other.clock.steps == 6
    told = [r.getMessage() for r in caplog.records]
    assert any("1.weight and 1 more" in line and "anew" in line for line in told)
    assert any("0.weight and 1 more" in line and "left aside" in line for line in told)


@pytest.mark.parametrize("update", ["lamb", "lars", "soap", "AdamW", "SGD"])
@pytest.mark.parametrize("before,after", [((0,), (0, 1)), ((0, 1), (1,)), ((1,), (0, 1))])
def test_what_is_trained_before_and_after_goes_on(update: str, before: tuple[int, ...], after: tuple[int, ...]) -> None:
    model = two_layers(before)
    optimizer = ours(update, model)
    plain = copy.deepcopy(model)
    base = theirs(update, train_only(plain, (0, 1)))
    train_only(plain, before)
    step(optimizer, model, 3)
    plainly(base, plain, 3)
    again = train_only(copy.deepcopy(model), after)
    other = ours(update, again)
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    step(other, again, 3)
    plainly(base, train_only(plain, after), 3)
    assert furthest(again, plain) < tolerance(update)


@pytest.mark.fast
def test_an_average_is_of_its_own_layer() -> None:
    model = two_layers((0,))
    optimizer = ours("SGD", model, keep=[EMA(decay=0.5)])
    step(optimizer, model, 3)
    saved = through_a_file(optimizer.state_dict())
    train_only(model, (1,))
    other = ours("SGD", model, keep=[EMA(decay=0.5)])
    other.load_state_dict(saved)
    weight: Any = model[1].weight
    wanted = weight.detach().clone()
    for _ in range(2):
        step(other, model)
        wanted.lerp_(weight.detach(), 0.5)
    torch.testing.assert_close(other.average("ema").tensors[0], wanted.flatten(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("update", [*OURS, "AdamW", "SGD", "NAdam"])
@pytest.mark.parametrize("names", [(False, True), (True, False)])
def test_names_that_come_or_go_change_nothing(update: str, names: tuple[bool, bool]) -> None:
    """torch goes by place, and so do counts and Vectors here."""
    model = two_layers()
    plain = copy.deepcopy(model)
    optimizer = ours(update, model, names=names[0])
    step(optimizer, model, 3)
    again = copy.deepcopy(model)
    other = ours(update, again, names=names[1])
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    assert through_a_file(other.state_dict()).keys() == optimizer.state_dict().keys()  # waiting
    other.load_state_dict(other.state_dict())
    step(other, again, 2)
    plainly(theirs(update, plain), plain, 5)
    assert furthest(again, plain) < tolerance(update)


@pytest.mark.fast
@pytest.mark.parametrize("names", [True, False])
def test_what_cannot_be_of_these_parameters_is_refused(names: bool) -> None:
    model = two_layers()
    optimizer = ours("lamb", model, names=names)
    step(optimizer, model)
    saved = optimizer.state_dict()
    wider = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2)).double()
    other = ours("lamb", wider, names=names)
    other.load_state_dict(saved)
    with pytest.raises(lso.UserError, match=r"parameter 0(\.weight)? was saved with shape \(2, 2\) and has \(3, 2\)"):
        step(other, wider)


@pytest.mark.fast
@pytest.mark.parametrize("base", ["lamb", "torch"])
def test_other_names_in_a_place_are_refused(base: str) -> None:
    """torch would give each place's momenta to whoever stands there now."""

    def over(layer: nn.Module, prefix: str) -> lso.LandscapeOptimizer:
        named: Any = list(layer.named_parameters(prefix))
        made = lso.UpdateOptimizer(named, "lamb", lr=0.1) if base == "lamb" else torch.optim.Adam(named)
        return lso.LandscapeOptimizer(made, lso.SAM())

    model = two_layers()
    first, second = over(model[0], "0"), over(model[1], "1")
    step(first, model)
    saved = first.state_dict()
    with pytest.raises(lso.UserError, match=r"place 0 was saved with parameter 0\.weight and has 1\.weight here"):
        second.load_state_dict(saved)
    for prefix in ("module.0", "_orig_mod.0", "model.0"):  # a wrapper around the model is the same parameter
        over(model[0], prefix).load_state_dict(saved)


@pytest.mark.fast
def test_an_earlier_state_without_names_goes_by_place_or_is_refused() -> None:
    model = two_layers()
    optimizer = ours("lamb", model)
    step(optimizer, model, 2)
    saved = optimizer.state_dict()
    again = copy.deepcopy(model)
    del saved["landscape"]["layouts"]
    other = ours("lamb", again)
    other.load_state_dict(copy.deepcopy(saved))
    step(other, again)
    step(optimizer, model)
    assert furthest(again, model) == 0
    other = ours("lamb", train_only(again, (1,)))
    other.load_state_dict(saved)
    with pytest.raises(lso.UserError, match=r"update/lamb was saved without names .* 4 tensors .* 2"):
        step(other, again)
