"""Updates that look at the curvature: what they see, when and where, and what is refused. Mostly one process, fp64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import elastic_lsopt as lso
from elastic_lsopt.oracle.clock import SampleClock
from elastic_lsopt.oracle.losses.loss import causal_lm_loss, classification_loss
from elastic_lsopt.oracle.microbatch_oracle import MicroBatchOracle
from elastic_lsopt.oracle.observation import HowProducts
from elastic_lsopt.updates.update import Update
from tests.cases.updates import sampling_loss
from tests.oracles.curvature import AdaHessian, signs
from tests.updates.test_param_groups import batch, engine_of, flat, halves, net, squares

pytestmark = pytest.mark.fast


def labelled(i: int) -> tuple[Tensor, Tensor]:
    x, y = batch(i)
    return x, y.argmax(1)


def sampling(model: nn.Module, base: torch.optim.Optimizer, **options: Any) -> lso.Engine:
    return lso.Engine.of(model, base, loss_fn=sampling_loss(), **options)


# -- what is seen ------------------------------------------------------------------------------------------------------


def test_the_diagonal_is_that_of_the_whole_hessian() -> None:
    """Each z * H z to rounding, and their mean over many z within five standard deviations of diag H."""
    model, steps = net(), 30
    names, sizes = [n for n, _ in model.named_parameters()], [p.numel() for p in model.parameters()]

    def loss(w: Tensor) -> Tensor:
        parts = {n: t.view(p.shape) for (n, p), t in zip(model.named_parameters(), w.split(sizes), strict=True)}
        return ((torch.func.functional_call(model, parts, (batch(0)[0],)) - batch(0)[1]) ** 2).mean()

    H: Any = torch.autograd.functional.hessian(loss, flat(model))
    engine, how, total = engine_of(model, torch.optim.SGD(model.parameters(), lr=0.1)), HowProducts(), 0.0
    for step in range(steps):
        engine.clock = SampleClock(samples=8 * step, steps=step)
        seen = torch.cat(engine.oracle([batch(0)]).hessian_diagonal(how).tensors)
        z = torch.cat([signs(n, p.detach(), step).reshape(-1) for n, p in zip(names, model.parameters(), strict=True)])
        assert torch.allclose(seen, z * (H @ z), rtol=0, atol=1e-12)
        total = total + seen / steps
    deviation = (H.square().sum(1) - H.diagonal().square()).div(steps).sqrt()
    assert how.checked and bool(((total - H.diagonal()).abs() <= 5 * deviation + 1e-12).all())


@pytest.mark.parametrize("update", ["adahessian", "sophia_h"])
def test_one_product_serves_all(update: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two groups with other hyper-parameters, and another update that sees the same."""
    model, made = net(), []
    ask = MicroBatchOracle.hessian_diagonal
    monkeypatch.setattr(
        MicroBatchOracle, "hessian_diagonal", lambda self, how: made.append(self.step) or ask(self, how)
    )
    first, second = halves(model)
    groups = [
        {"params": first, "update": update, "betas": (0.5, 0.5), "every": 2},
        {"params": second[:1], "update": update, "betas": (0.9, 0.9), "every": 1},
        {"params": second[1:], "update": "sassha", "every": 3},
    ]
    engine = engine_of(model, lso.UpdateOptimizer(groups, lr=0.01))
    for i in range(3):
        engine.train_batch([batch(i)])
    assert made == [0, 1, 2] and engine.last_step is not None and engine.last_step.passes == 1 + 3, (
        "a product is three gradients"
    )
    seen = {k: v for k, v in engine.families[f"update/{update}"].state_dict().items() if k.startswith("seen/")}
    assert seen == {"seen/0.weight": 2, "seen/0.bias": 2, "seen/2.weight": 3}


def test_a_look_is_a_pass_and_the_loss_is_still_that_of_the_labels() -> None:
    model = net()
    engine = sampling(model, lso.UpdateOptimizer(model.parameters(), "sophia_g", lr=0.01, every=2))
    for i, passes in enumerate([2, 1, 2, 1]):
        expected = float(nn.functional.cross_entropy(model(labelled(i)[0]), labelled(i)[1]).detach())
        assert engine.train_batch([labelled(i)]) == pytest.approx(expected, abs=1e-14)
        assert engine.last_step is not None and engine.last_step.passes == passes


def test_what_was_never_seen_is_seen_at_once() -> None:
    """A job that begins with another update's checkpoint, at a step that is no multiple of `every`."""
    model = net()
    engine = engine_of(model, lso.UpdateOptimizer(model.parameters(), "sassha", lr=0.01, every=10))
    engine.clock = SampleClock(samples=24, steps=3)
    before = flat(model)
    for i in range(2):
        engine.train_batch([batch(i)])
    state: Any = engine.families["update/sassha"].state_dict()
    assert state["seen/0.weight"] == 1 and all(bool((t > 0).any()) for t in state["d"].tensors)
    assert float((flat(model) - before).abs().max()) < 1.0


def test_where_a_look_is_not_finite_the_step_is_skipped() -> None:
    model, bad = net(), [True]
    whole = sampling_loss()
    assert whole.sample is not None

    def sample(logits: Tensor, pair: Any) -> Any:
        x, y = whole.sample(logits, pair)  # type: ignore[misc]
        return (x, y, bad[0])

    def criterion(logits: Tensor, pair: Any) -> Tensor:
        return whole.criterion(logits, pair) * (float("nan") if len(pair) == 3 and pair[2] else 1.0)

    loss = lso.Loss(whole.forward, criterion, whole.count, sample=sample)
    engine = lso.Engine.of(model, lso.UpdateOptimizer(model.parameters(), "sophia_g", lr=0.01), loss_fn=loss)
    before = flat(model)
    engine.train_batch([labelled(0)])
    assert engine.skipped_steps == 1 and torch.equal(flat(model), before)
    bad[0] = False
    engine.train_batch([labelled(0)])
    assert engine.skipped_steps == 1 and not torch.equal(flat(model), before)


# -- what is made of it ------------------------------------------------------------------------------------------------


class Bowl(nn.Module):
    """a w^2 / 2 of each weight: its Hessian is diagonal, so that any z sees it exactly."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([3.0, -0.2, 0.05, -4.0], dtype=torch.float64))

    def forward(self, a: Tensor) -> Tensor:
        return (a * self.w**2 / 2).sum(-1).mean()


A = torch.tensor([[5.0, 0.1, 2.0, 1e-3]], dtype=torch.float64)


def bowl_step(update: str, **options: Any) -> tuple[Tensor, Tensor]:
    model = Bowl()
    before = model.w.detach().clone()
    base = lso.UpdateOptimizer(model.parameters(), update, lr=0.5, **options)
    lso.Engine.of(model, base, loss_fn=lambda model, a: model(a)).train_batch([A])
    return before, model.w.detach()


def test_sophia_on_a_bowl_is_newton_with_a_cap() -> None:
    before, after = bowl_step("sophia_h", betas=(0.0, 0.0), gamma=1.0)
    assert torch.allclose(after, before - 0.5 * before.clamp(-1, 1), rtol=0, atol=1e-14)


def test_adahessian_and_sassha_on_a_bowl_are_newton() -> None:
    for update, options in (("adahessian", {}), ("sassha", {"power": 1.0})):
        before, after = bowl_step(update, eps=0.0, **options)
        assert torch.allclose(after, before - 0.5 * before, rtol=0, atol=1e-14)


@pytest.mark.parametrize(("update", "rest"), [("adahessian", {"power": 0.0}), ("sassha", {"power": 0.0})])
def test_at_rest_they_are_momentum_with_a_corrected_mean(update: str, rest: dict[str, float]) -> None:
    mine, theirs = net(), net()
    engine = engine_of(mine, lso.UpdateOptimizer(mine.parameters(), update, lr=0.1, weight_decay=0.1, eps=0.0, **rest))
    m = [torch.zeros_like(p) for p in theirs.parameters()]
    for i in range(4):
        engine.train_batch([batch(i)])
        grads = torch.autograd.grad(squares(theirs, batch(i)), list(theirs.parameters()))
        with torch.no_grad():
            for p, g, own in zip(theirs.parameters(), grads, m, strict=True):
                own.lerp_(g, 0.1)
                p.mul_(1 - 0.01).sub_(0.1 * own / (1 - 0.9 ** (i + 1)))
    assert torch.allclose(flat(mine), flat(theirs), rtol=0, atol=1e-13)


@pytest.mark.parametrize(("update", "rest"), [("sophia_g", {"rho": 0.0}), ("sophia_h", {"gamma": 0.0})])
def test_at_rest_sophia_is_the_sign_of_momentum(update: str, rest: dict[str, float]) -> None:
    mine, theirs = net(), net()
    engine = sampling(mine, lso.UpdateOptimizer(mine.parameters(), update, lr=0.01, **rest))
    m = [torch.zeros_like(p) for p in theirs.parameters()]
    for i in range(4):
        engine.train_batch([labelled(i)])
        loss = nn.functional.cross_entropy(theirs(labelled(i)[0]), labelled(i)[1])
        with torch.no_grad():
            for p, g, own in zip(
                theirs.parameters(), torch.autograd.grad(loss, list(theirs.parameters())), m, strict=True
            ):
                own.mul_(0.965).add_(g, alpha=1 - 0.965)
                p.sub_(0.01 * own.sign())
    assert torch.allclose(flat(mine), flat(theirs), rtol=0, atol=1e-13)


def test_adahessian_averages_over_the_kernels_of_a_convolution() -> None:
    torch.manual_seed(0)
    mine = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)).double()
    theirs = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)).double()
    theirs.load_state_dict(mine.state_dict())
    pair = torch.randn(6, 2, 4, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2])
    options = {"lr": 0.05, "weight_decay": 0.1, "eps": 1e-2}
    engine = sampling(mine, lso.UpdateOptimizer(mine.parameters(), "adahessian", **options))
    base = AdaHessian(theirs.parameters(), **options)
    for step in range(3):
        engine.train_batch([pair])
        base.look(theirs, [pair], step)
        theirs.zero_grad()
        nn.functional.cross_entropy(theirs(pair[0]), pair[1]).backward()
        base.step()
    assert torch.allclose(flat(mine), flat(theirs), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("kind", "world"), [("zero2", 3), ("zero3", 2)])
def test_blocks_that_ranks_cut_have_the_mean_of_the_whole(ranks: Any, kind: str, world: int) -> None:
    for r in ranks(world).run("tests.cases.updates:block_means", kind=kind):
        assert r["off"] < 1e-6 and r["sums"] == 1.0 and r["none"] == 0.0, r


# -- drawn labels ------------------------------------------------------------------------------------------------------


def sampled(loss: lso.Loss, logits: Tensor, labels: Tensor) -> Tensor:
    assert loss.sample is not None
    torch.manual_seed(0)
    before = labels.clone()
    out = loss.sample(logits, {"x": logits, "labels": labels})
    assert torch.equal(labels, before) and out["x"] is logits
    return out["labels"]


def test_drawn_labels_are_of_the_model_and_masks_stay() -> None:
    p = torch.tensor([0.5, 0.3, 0.2])
    logits, labels = p.log().expand(9000, 3), torch.zeros(9000, dtype=torch.long)
    labels[::3] = -100
    drawn = sampled(classification_loss(), logits, labels)
    assert bool((drawn[::3] == -100).all())
    kept = drawn[drawn != -100]
    share = torch.bincount(kept, minlength=3) / len(kept)
    assert float((share - p).abs().max()) < 5 * 0.5 / len(kept) ** 0.5
    several = sampled(classification_loss(), p.logit().expand(9000, 3), torch.zeros(9000, 3))
    assert float((several.mean(0) - p).abs().max()) < 0.03 and set(several.unique().tolist()) == {0.0, 1.0}


def test_drawn_tokens_are_those_that_the_position_before_predicts() -> None:
    logits = torch.full((2, 4, 5), -50.0)
    logits[:, :, :] = torch.where(torch.arange(5) == torch.tensor([1, 2, 3, 4])[:, None], 50.0, -50.0)
    drawn = sampled(causal_lm_loss(), logits, torch.tensor([[7, 0, 0, 0], [0, -100, 0, 0]]))
    assert drawn.tolist() == [[7, 1, 2, 3], [0, -100, 2, 3]]


# -- refusals ----------------------------------------------------------------------------------------------------------

CLOSURE = "looks at the curvature of the loss, and a closure gives gradients only"
WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("sophia_g", {"rho": -1}, "rho=-1 must be a number >= 0"),
    ("sophia_g", {"every": 0}, "every=0 must be a whole number >= 1"),
    ("sophia_h", {"betas": (0.9,)}, "betas=(0.9,) must be two numbers"),
    ("sophia_h", {"eps": 0.0}, "eps=0.0 must be a number > 0"),
    ("adahessian", {"power": 2.0}, "power=2.0 must be within 0 and 1"),
    ("adahessian", {"average": "all"}, "average='all' must be kernel, row or none"),
    ("sassha", {"eps": "1e-4"}, "eps='1e-4' must be a number >= 0"),
]


def refused(make: Callable[[], object], says: str) -> None:
    with pytest.raises(lso.UserError) as caught:
        make()
    assert says in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(("update", "options", "says"), WRONG, ids=str)
def test_values_out_of_range(update: str, options: dict[str, Any], says: str) -> None:
    refused(lambda: lso.UpdateOptimizer(net().parameters(), update, lr=0.1, **options), says)


@pytest.mark.parametrize("update", ["sophia_g", "sophia_h", "adahessian", "sassha"])
def test_a_loss_that_cannot_be_looked_at(update: str) -> None:
    model = net()
    base = lso.UpdateOptimizer(model.parameters(), update, lr=0.1)
    refused(lambda: lso.LandscapeOptimizer(base, lso.SAM(), model=model), CLOSURE)
    if update == "sophia_g":
        refused(lambda: engine_of(model, base), "update sophia_g draws labels from the model, and this loss does not")
        plain = lso.Loss(lambda m, b: m(b[0]), lambda z, b: ((z - b[1]) ** 2).mean(), lambda b: len(b[0]))
        refused(lambda: lso.Engine.of(model, base, loss_fn=plain), "give lso.Loss(forward, criterion, count, sample=…)")
    else:
        engine_of(model, base).train_batch([batch(0)])


def test_a_sum_of_losses_is_refused_at_the_first_look() -> None:
    model = net()
    base = lso.UpdateOptimizer(model.parameters(), "sophia_h", lr=0.1)
    engine = lso.Engine.of(model, base, loss_fn=lambda model, pair: ((model(pair[0]) - pair[1]) ** 2).sum())
    refused(lambda: engine.train_batch([batch(0)]), "the loss is not a mean")


@pytest.mark.parametrize(
    "own,says",
    [
        ({"sees": "hessian_diagonal"}, "sees 'hessian_diagonal' and must define observe(space, seen, state)"),
        ({"sees": "hessian"}, "sees='hessian' must be one of nothing, sampled_gradient, hessian_diagonal"),
        ({"where": "end"}, "where='end' must be one of weights, last_pass"),
    ],
)
@pytest.mark.parametrize("given", ["class", "instance"])
def test_an_own_rule_that_does_nothing_with_what_it_sees_is_refused(own: Any, says: str, given: str) -> None:
    """When the base is made, and not in its first step."""
    kind = type("Mine", (Update,), {**own, "update": lambda *_: None})
    with pytest.raises(lso.UserError) as caught:
        lso.UpdateOptimizer([torch.nn.Parameter(torch.zeros(2))], kind if given == "class" else kind(), lr=0.1)
    assert says in str(caught.value) and "(Mine)" in str(caught.value) and "\n" not in str(caught.value)
