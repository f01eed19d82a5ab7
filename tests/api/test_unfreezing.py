"""What is unfrozen or added after the first step takes part in the next one, perturbed and clipped."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import elastic_lsopt as lso
from elastic_lsopt.backends.detect import backend_for
from elastic_lsopt.updates.torch_update import ELEMENT_WISE
from tests.cases import updates
from tests.oracles import paper_loops

HYPER, CLIP = {"rho": 0.3}, 0.01
MORE: dict[str, dict[str, Any]] = {"AdamW": {"weight_decay": 0.0}, "SGD": {"momentum": 0.9, "dampening": 0.9}}
"""Beside the rate, of torch's classes."""


def problem() -> tuple[nn.Sequential, list[Any]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    model[0].requires_grad_(False)
    return model, [[(torch.randn(4, 5).double(), torch.randint(0, 3, (4,)))] for _ in range(4)]


def by_the_paper(model: nn.Module, batches: Any, frozen_again: bool) -> nn.Module:
    """Two steps, unfreeze, two steps; or the other way round. Momentum starts with a parameter's first step."""
    model = copy.deepcopy(model)
    base = torch.optim.SGD(model.named_parameters(), lr=0.1, momentum=0.9)
    if frozen_again:
        model.requires_grad_(True)
    paper_loops.run(model, batches[:2], base, "sam", HYPER, clip=CLIP)
    model.requires_grad_(not frozen_again)
    model[2].requires_grad_(True)  # type: ignore[index]
    model.zero_grad()
    paper_loops.run(model, batches[2:], base, "sam", HYPER, clip=CLIP)
    return model


def step(optimizer: lso.LandscapeOptimizer, model: nn.Module, batches: Any, *, empties: bool = True) -> None:
    for [batch] in batches:

        def closure(batch: Any = batch) -> Tensor:
            if empties:
                optimizer.zero_grad()
            loss = paper_loops.cross_entropy(model, batch)
            loss.backward()
            return loss

        optimizer.step(closure)


def furthest(a: nn.Module, b: nn.Module) -> float:
    return max(float((p - q).detach().abs().max()) for p, q in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("empties", [True, False])
@pytest.mark.parametrize("way", ["requires_grad", "add_param_group", "freeze"])
def test_what_changes_after_the_first_step_is_the_papers(way: str, empties: bool) -> None:
    model, batches = problem()
    wanted = by_the_paper(model, batches, frozen_again=way == "freeze")
    first = model[2].named_parameters(prefix="2") if way == "add_param_group" else model.named_parameters()
    base = torch.optim.SGD(first, lr=0.1, momentum=0.9)
    optimizer = lso.LandscapeOptimizer(base, lso.SAM(**HYPER), max_grad_norm=CLIP)
    if way == "freeze":
        model.requires_grad_(True)
    step(optimizer, model, batches[:2], empties=empties)
    model[0].requires_grad_(way != "freeze")
    if way == "add_param_group":  # as Lightning's BaseFinetuning does
        optimizer.add_param_group({"params": list(model[0].named_parameters(prefix="0"))})
    step(optimizer, model, batches[2:], empties=empties)
    assert furthest(model, wanted) < 1e-12
    assert optimizer.clock.steps == 4 and len(optimizer.space.layout.parameters) == (2 if way == "freeze" else 4)


class Averaging:
    """A method with a Vector: the mean of all gradients so far."""

    parts = 1

    def init(self, space: Any) -> dict[str, Any]:
        return {"sum": space.zeros(), "steps": 0}

    def gradient(self, space: Any, oracle: Any, state: Any) -> Any:
        state["sum"] += oracle.gradient()
        state["steps"] += 1
        return state["sum"].clone()


@pytest.mark.fast
def test_a_methods_vectors_keep_their_elements() -> None:
    model, batches = problem()
    optimizer = lso.LandscapeOptimizer(torch.optim.SGD(model.named_parameters(), lr=0.0), Averaging())
    step(optimizer, model, batches[:2])
    before = dict(zip(["2.weight", "2.bias"], optimizer.method_state["sum"].tensors, strict=True))
    kept = {n: t.clone() for n, t in before.items()}
    model.requires_grad_(True)
    names = [p.name for p in optimizer.space.layout.parameters]
    after = dict(zip(names, optimizer.method_state["sum"].tensors, strict=True))
    assert optimizer.method_state["steps"] == 2
    assert all(torch.equal(after[n], t) for n, t in kept.items())
    assert not after["0.weight"].any() and not after["0.bias"].any()
    step(optimizer, model, batches[2:])
    assert optimizer.method_state["sum"].tensors[0].any()


@pytest.mark.fast
def test_a_parameter_that_is_replaced_is_refused() -> None:
    model, batches = problem()
    optimizer = lso.LandscapeOptimizer(torch.optim.SGD(model.named_parameters(), lr=0.1), lso.SAM())
    step(optimizer, model, batches[:1])
    optimizer.param_groups[0]["params"][0] = nn.Parameter(torch.zeros(8, 5))
    with pytest.raises(lso.UserError, match="removed or replaced after the first step; build a new"):
        step(optimizer, model, batches[1:])


@pytest.mark.fast
@pytest.mark.parametrize("unfreeze", [True, False])
def test_an_engine_refuses(unfreeze: bool) -> None:
    model, batches = problem()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    engine = lso.Engine(backend_for(model, base), lso.SAM(), loss_fn=paper_loops.cross_entropy)
    engine.train_batch(batches[0])
    before = [p.detach().clone() for p in model.parameters()]
    changed = model[0].weight if unfreeze else model[2].weight
    changed.requires_grad_(unfreeze)
    now = "trainable" if unfreeze else "frozen"
    with pytest.raises(lso.UserError, match=rf"parameter {0 if unfreeze else 2}\.weight is {now} and was not when the"):
        engine.train_batch(batches[1])
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("way", ["requires_grad", "add_param_group"])
@pytest.mark.parametrize(
    "update",
    ["lamb", "adaptive_memory_sgd"]
    + [pytest.param(u, marks=pytest.mark.full) for u in ("lars", "soap", "adaptive_memory_adamw")],
)
def test_an_update_begins_with_each_parameter(update: str, way: str) -> None:
    """Corrections of young means, and what is taken for the first gradient, are those of the parameter's own steps."""
    model, batches = problem()
    plain = copy.deepcopy(model)
    theirs, (name, options) = updates.theirs(update, plain.requires_grad_(True)), updates.OPTIONS[update]
    plain[0].requires_grad_(False)
    first = model[2].named_parameters(prefix="2") if way == "add_param_group" else model.named_parameters()
    optimizer = lso.LandscapeOptimizer(lso.UpdateOptimizer(first, name, **options), lso.Plain())
    for k, [batch] in enumerate(batches):
        if k == 2:
            model.requires_grad_(True)
            plain.requires_grad_(True)
            if way == "add_param_group":
                optimizer.add_param_group({"params": list(model[0].named_parameters(prefix="0"))})
        step(optimizer, model, [[batch]])
        plain.zero_grad()
        paper_loops.cross_entropy(plain, batch).backward()
        theirs.step()
    assert furthest(model, plain) < (1e-6 if update == "soap" else 1e-12)  # whose decompositions are in fp32


@pytest.mark.parametrize("update", ["lamb", pytest.param("adaptive_memory_adamw", marks=pytest.mark.full)])
def test_what_is_frozen_and_unfrozen_again_begins_anew(update: str) -> None:
    """An update's memory of it ends with the freezing, its count of steps too."""
    model, batches = problem()
    model.requires_grad_(True)
    plain = copy.deepcopy(model)
    theirs, (name, options) = updates.theirs(update, plain), updates.OPTIONS[update]
    optimizer = lso.LandscapeOptimizer(lso.UpdateOptimizer(model.named_parameters(), name, **options), lso.Plain())
    for k, [batch] in enumerate([*batches, *batches]):
        for net in (model, plain):
            net[0].requires_grad_(not 2 <= k < 4)
        if k == 4:
            for p in plain[0].parameters():
                del theirs.state[p]
        step(optimizer, model, [[batch]])
        plain.zero_grad()
        paper_loops.cross_entropy(plain, batch).backward()
        theirs.step()
    assert furthest(model, plain) < 1e-12


@pytest.mark.fast
@pytest.mark.parametrize("kind", sorted(kind.__name__ for kind in ELEMENT_WISE))
def test_torchs_classes_begin_with_the_next_block(kind: str) -> None:
    """Layer 2 was trained and is frozen, layer 0 the other way round: its first step is torch's first step."""
    model, batches = problem()
    optimizer = lso.LandscapeOptimizer(
        lso.UpdateOptimizer(model.named_parameters(), kind, lr=0.01, **MORE.get(kind, {})), lso.Plain()
    )
    step(optimizer, model, batches[:2])
    model[0].requires_grad_(True)
    model[2].requires_grad_(False)
    plain = copy.deepcopy(model)
    theirs = getattr(torch.optim, kind)(plain[0].parameters(), lr=0.01, **MORE.get(kind, {}))
    step(optimizer, model, batches[2:])
    paper_loops.run(plain, batches[2:], theirs, "none", {})
    assert furthest(model, plain) < 1e-12


@pytest.mark.fast
@pytest.mark.parametrize("way", ["requires_grad", "add_param_group", "resume"])
def test_the_first_momentum_of_a_later_parameter_is_its_gradient(way: str) -> None:
    """As in torch, where dampening is for later ones."""
    model, batches = problem()
    plain, said = copy.deepcopy(model), {"lr": 0.1, **MORE["SGD"]}

    def made() -> lso.LandscapeOptimizer:
        named = model[2].named_parameters(prefix="2") if way == "add_param_group" else model.named_parameters()
        return lso.LandscapeOptimizer(lso.UpdateOptimizer(named, "SGD", **said), lso.Plain())

    optimizer, theirs = made(), torch.optim.SGD(plain.parameters(), **said)
    step(optimizer, model, batches[:2])
    paper_loops.run(plain, batches[:2], theirs, "none", {})
    if way == "resume":
        state, optimizer = optimizer.state_dict(), made()
        optimizer.load_state_dict(state)
    for net in (model, plain):
        net.requires_grad_(True)
        net.zero_grad()
    if way == "add_param_group":
        optimizer.add_param_group({"params": list(model[0].named_parameters(prefix="0"))})
    step(optimizer, model, batches[2:])
    paper_loops.run(plain, batches[2:], theirs, "none", {})
    assert furthest(model, plain) < 1e-12
