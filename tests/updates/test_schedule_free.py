"""Schedule-free: the model is at x, which the authors' package gives in eval mode, and is evaluated there."""

from __future__ import annotations

from typing import Any

import pytest
import schedulefree
import torch

import elastic_lsopt as lso
from tests.updates.test_param_groups import batch, engine_of, flat, halves, loop, net, squares

AUTHORS = {"sgd": schedulefree.SGDScheduleFree, "adamw": schedulefree.AdamWScheduleFree}


def theirs(form: str, params: Any, **options: Any) -> Any:
    made = AUTHORS[form](params, **options)
    made.train()
    return made


@pytest.mark.fast
@pytest.mark.parametrize("form", ["sgd", "adamw"])
def test_the_average_is_where_the_authors_evaluate(form: str) -> None:
    mine, other = net(), net()
    base = lso.UpdateOptimizer(mine.parameters(), "schedule_free", form=form, lr=0.05, weight_decay=0.1)
    engine, authors = engine_of(mine, base), theirs(form, other.parameters(), lr=0.05, weight_decay=0.1)
    for i in range(6):
        engine.train_batch([batch(i)])
    loop(other, authors)
    assert engine.evaluates_at == "schedule_free"
    assert torch.allclose(flat(mine), flat(other), rtol=0, atol=1e-13)
    authors.eval()
    y = flat(mine)
    with engine.averaged("schedule_free"):
        assert torch.allclose(flat(mine), flat(other), rtol=0, atol=1e-13)
        assert engine.evaluate([[batch(9)]]) == pytest.approx(float(squares(other, batch(9)).detach()), abs=1e-13)
    assert torch.equal(flat(mine), y) and float((y - flat(other)).abs().max()) > 1e-4


@pytest.mark.fast
def test_at_a_constant_rate_x_is_the_mean_of_z() -> None:
    model = net()
    base = lso.UpdateOptimizer(model.parameters(), "schedule_free", form="sgd", lr=0.1)
    engine, points = engine_of(model, base), []
    for i in range(5):
        engine.train_batch([batch(i)])
        z: Any = engine.families["update/schedule_free"].state_dict()["z"]
        points.append(torch.cat([t.clone() for t in z.tensors]))
    x = torch.cat(engine.average("schedule_free").tensors)
    assert torch.allclose(x, torch.stack(points).mean(0), rtol=0, atol=1e-13)


@pytest.mark.fast
def test_rates_that_move_and_groups_are_the_authors() -> None:
    """A warm-up from 0, another interpolation and rate in one of two groups."""
    mine, other = net(), net()
    first, second = {"lr": 0.05, "interpolation": 0.8}, {"lr": 0.2, "interpolation": 0.95}
    kept = {"update": "schedule_free", "form": "sgd"}
    base = lso.UpdateOptimizer(
        [{"params": p, **kept, **own} for p, own in zip(halves(mine), (first, second), strict=True)], lr=0.1
    )
    groups = zip(halves(other), (first, second), strict=True)
    each = [theirs("sgd", p, lr=own["lr"], momentum=own["interpolation"]) for p, own in groups]
    engine = engine_of(mine, base)
    for i in range(6):
        share = min(i / 3, 1.0)
        for own, authors, peak in zip(base.param_groups, each, (first, second), strict=True):
            own["lr"] = authors.param_groups[0]["lr"] = peak["lr"] * share
        engine.train_batch([batch(i)])
        other.zero_grad()
        squares(other, batch(i)).backward()
        for authors in each:
            authors.step()
    assert torch.allclose(flat(mine), flat(other), rtol=0, atol=1e-13)
    for authors in each:
        authors.eval()
    x = torch.cat(engine.average("schedule_free").tensors)
    assert torch.allclose(x, flat(other), rtol=0, atol=1e-13)


@pytest.mark.fast
def test_beside_another_update_the_others_are_at_their_weights() -> None:
    model = net()
    sides = halves(model)
    base = lso.UpdateOptimizer(
        [{"params": sides[0], "update": "schedule_free"}, {"params": sides[1], "update": "AdamW"}], lr=0.05
    )
    engine = engine_of(model, base)
    for i in range(3):
        engine.train_batch([batch(i)])
    x, n = torch.cat(engine.average("schedule_free").tensors), sum(p.numel() for p in sides[0])
    assert torch.equal(x[n:], flat(model)[n:]) and not torch.equal(x[:n], flat(model)[:n])


@pytest.mark.parametrize(("kind", "world"), [("zero2", 2), pytest.param("fsdp2", 3, marks=pytest.mark.full)])
def test_on_shards(ranks: Any, kind: str, world: int) -> None:
    for r in ranks(world).run("tests.cases.updates:at_its_point", kind=kind):
        assert r["x"] < 1e-6 and r["loss"] < 1e-6 and r["back"] == 0.0 and r["moved"] > 1e-4, r
