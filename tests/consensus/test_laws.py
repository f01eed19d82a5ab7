"""Laws of the rules of consensus: closed forms, rest points, what is kept and who is unmoved; in one process."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import elastic_lsopt as lso
from elastic_lsopt.consensus import registry
from elastic_lsopt.consensus.rule import Rule
from elastic_lsopt.errors import NonFinite
from elastic_lsopt.oracle.step_report import StepReport
from tests.cases import consensus, engines, together
from tests.cases.together import Member, at, drifted, heard_of, meet
from tests.consensus.test_loops import DOUBLE, UNEVEN, largest
from tests.oracles import paper_loops

PLAIN_ENTROPY = {
    "inner_steps": 1, "gamma0": 0.0, "gamma1": 0.0, "noise": 0.0, "inner_lr": 1.0, "inner_momentum": 0.0, "average": 0.0
}  # fmt: skip
"""Entropy-SGD whose walk is one step of the gradient."""


def random_points(count: int, size: int = 5, seed: int = 0) -> list[Tensor]:
    return [*torch.randn(count, size, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))]


def report(loss: float) -> StepReport:
    return StepReport(loss, 1, 1.0, 4, False)


def with_losses(rule: Rule, members: Sequence[Member], losses: Sequence[float]) -> None:
    for m, loss in zip(members, losses, strict=True):
        rule.after_step(m.space, report(loss), m.state)


def with_gradients(rule: Rule, *gradients: Sequence[float], start: float = 0.0) -> list[Member]:
    """Replicas at k, k + 1 … (all elements), each with a loss whose gradient is the same everywhere."""
    members = at(rule, *([start + k] * len(g) for k, g in enumerate(gradients)))
    for m, g in zip(members, gradients, strict=True):
        module: Any = m.space.shards
        _, m.oracle = lso.attach(module.module, lambda model, x: model(x).sum(), [torch.tensor([g], dtype=DOUBLE)])
    return members


# -- rest points -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("owns", [[range(3), range(3, 6)], UNEVEN], ids=["equal", "uneven"])
def test_averaging_after_each_step_is_synchronous(owns: list[range]) -> None:
    """tau = 1 and full pull under plain SGD is data parallelism on the whole batch, also where replicas are unequal."""
    steps = engines.batches(6, owns[-1].stop, last=2, dtype=DOUBLE)
    rule = registry.build("local_sgd", tau=1)
    members, _ = drifted(rule, steps, owns, base="sgd")
    one = engines.net((), DOUBLE)
    paper_loops.run(one, steps, engines.optimizer("sgd")([*one.named_parameters()]), "none", {})
    whole = torch.cat([p.detach().reshape(-1) for p in one.parameters()])
    for found in together.point(rule, members):
        assert float((found - whole).abs().max()) <= 1e-14
    assert float((members[0].x - whole).abs().max()) > 1e-4, "the last step is not averaged yet: the test sees nothing"


ALONE: list[tuple[str, dict[str, Any]]] = [
    ("local_sgd", {"pull": 0.0}), ("easgd", {"beta": 0.0}), ("eamsgd", {"beta": 0.0}), ("lsam", {"beta": 0.0}),
    ("lsgd", {"pull": 0.0, "prox": 0.0}), ("mgrawa", {"pull": 0.0}), ("lgrawa", {"pull": 0.0}),
    ("lgrawa", {"pull": 0.0, "norms": "training"}), ("dppf", {"pull": 0.0, "push": 0.0}), ("parle", {"rho0": 0.0}),
    ("streaming_diloco", {"alpha": 1.0, "fragments": 2, "overlap": 1, "tau": 4}),
]  # fmt: skip


class Watching(engines.Net):
    """Dropout, and a running mean of what it sees: what a gradient more would disturb."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(["dropout"])
        self.register_buffer("seen", torch.zeros(engines.FEATURES))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen.lerp_(x.detach().mean(0), 0.5)
        return super().forward(x)


@pytest.mark.parametrize("rule,hyper", ALONE, ids=[row[0] for row in ALONE])
def test_without_a_pull_replicas_are_alone(rule: str, hyper: dict[str, Any]) -> None:
    """Bit for bit, buffers too."""
    steps = engines.batches(7, 7, last=2, dtype=DOUBLE)
    method, of_method = consensus.METHODS.get(rule, consensus.SAM)
    made = registry.build(rule, **{"tau": 2, **hyper})
    members, together_ = drifted(made, steps, UNEVEN, method=method, of_method=of_method, model=Watching)
    for own, m, engine in zip(UNEVEN, members, together_, strict=True):
        single = engines.build("plain", Watching(), lso.registry.build(method, **of_method))
        for step in steps:
            single.train_batch([lso.MicroBatch(u, step[u], place=u - own.start) for u in own])
        assert torch.equal(m.x, torch.cat([t.clone() for t in single.space.weights.tensors]))
        assert torch.equal(engine.module.seen, single.module.seen)  # type: ignore[arg-type]


def test_parle_without_a_walk_is_an_elastic_force() -> None:
    """x_i <- x_i - lr (g_i + rho_t (x_i - mean)), the mean of before each step; rho grows up to 10."""
    steps, owns = engines.batches(6, 4, dtype=DOUBLE), [range(2), range(2, 4)]
    rule = registry.build("parle", tau=1, rho0=2.0, rho1=0.5)
    members, _ = drifted(rule, steps, owns, method="entropy_sgd", of_method=PLAIN_ENTROPY, base="sgd")
    nets = [engines.net((), DOUBLE) for _ in owns]
    for rho, step in zip([2.0, 3.0, 4.5, 6.75, 10.0, 10.0], steps, strict=True):
        before = [[p.detach().clone() for p in net.parameters()] for net in nets]
        means = [torch.stack(of_all).mean(0) for of_all in zip(*before, strict=True)]
        for own, net in zip(owns, nets, strict=True):
            units = [step[u] for u in own]
            _, g = paper_loops.gradient(net, units, paper_loops.by_samples(units))
            with torch.no_grad():
                for p, mean, d in zip(net.parameters(), means, g.values(), strict=True):
                    p.sub_(0.1 * (d + rho * (p - mean)))
    for m, net in zip(members, nets, strict=True):
        assert float((m.x - torch.cat([p.detach().reshape(-1) for p in net.parameters()])).abs().max()) <= 1e-13


@pytest.mark.parametrize("rule", ["diloco", "muloco", "sparseloco", "streaming_diloco"])
def test_an_outer_step_of_one_is_averaging(rule: str) -> None:
    """lr 1, no momentum, nothing held back: the replicas' mean by samples."""
    rest = {"streaming_diloco": {"fragments": 1, "overlap": 0, "alpha": 0.0, "momentum": 0.0}, "sparseloco": {}}
    made = registry.build(rule, tau=1, lr=1.0, **rest.get(rule, {"momentum": 0.0}))
    points = random_points(3)
    members = [replace(m, samples=n) for m, n in zip(at(made, *points), (8, 16, 2), strict=True)]
    mean = (8 * points[0] + 16 * points[1] + 2 * points[2]) / 26
    for x in meet(made, members, told=largest(5, 5) if rule == "sparseloco" else None):
        assert float((x - mean).abs().max()) <= 1e-15


def test_diloco_of_equal_replicas_is_one_with_an_outer_momentum() -> None:
    """The closed form for a constant step d of the inner optimizer: v_k = d (1 - m^k) / (1 - m)."""
    rule = registry.build("diloco", lr=0.7, momentum=0.9)
    members = at(rule, *[torch.zeros(3, dtype=DOUBLE)] * 3)
    d, x, v = torch.tensor([1.0, -2.0, 0.5], dtype=DOUBLE), torch.zeros(3, dtype=DOUBLE), 0.0
    for k in range(6):
        for m in members:
            m.x = m.x - d
        found = meet(rule, members, k)
        v = (1 - 0.9 ** (k + 1)) / (1 - 0.9)
        x = x - 0.7 * (1 + 0.9 * v) * d
        assert all(float((f - x).abs().max()) <= 1e-14 for f in found)


def test_streaming_of_one_fragment_at_once_is_diloco() -> None:
    steps = engines.batches(10, 7, last=2, dtype=DOUBLE)
    one = registry.build("diloco", tau=3, lr=0.6, momentum=0.8)
    other = registry.build("streaming_diloco", tau=3, lr=0.6, momentum=0.8, fragments=1, overlap=0, alpha=0.0)
    (a, _), (b, _) = (drifted(rule, steps, UNEVEN) for rule in (one, other))
    assert all(torch.equal(m.x, n.x) for m, n in zip(a, b, strict=True))


def test_what_sparseloco_holds_back_is_told_later() -> None:
    """Without decay: all that was told, and what is left, are all that the replicas have done."""
    rule = registry.build("sparseloco", decay=1.0)
    members = at(rule, *[torch.zeros(12, dtype=DOUBLE)] * 2)
    done = torch.zeros(12, dtype=DOUBLE)
    for k in range(9):
        for m, step in zip(members, random_points(2, 12, seed=k), strict=True):
            m.x = m.x + step
            done = done + step / 2
        meet(rule, members, k, told=largest(2, 6))
        assert len({tuple(m.x.tolist()) for m in members}) == 1
        left = sum(m.kept["left"] for m in members)
        assert float((members[0].x - left - done).abs().max()) <= 1e-14 and float(left.abs().max()) > 0


# -- EASGD, DPPF ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 4])
def test_easgd_keeps_the_sum_and_its_centre_goes_as_far_whoever_is_there(count: int) -> None:
    """x~ <- (1 - beta) x~ + beta mean, for any number of replicas; without gradients sum x_i + x~ stays."""
    rule = registry.build("easgd", beta=0.6)
    points = random_points(count)
    members = at(rule, *points)
    centre, total = points[0], sum(points) + points[0]
    for k in range(12):
        before = [m.x for m in members]
        found = meet(rule, members, k)
        for x, b in zip(found, before, strict=True):
            assert float((x - (b - 0.6 / count * (b - centre))).abs().max()) <= 1e-15
        centre = 0.4 * centre + 0.6 * sum(before) / count
        assert all(float((torch.cat(m.state["centre"].tensors) - centre).abs().max()) <= 1e-15 for m in members)
        assert float((sum(found) + centre - total).abs().max()) <= 1e-14
    assert all(torch.equal(p, torch.cat(members[0].state["centre"].tensors)) for p in together.point(rule, members))


def test_dppf_of_two_workers() -> None:
    """r_{k+1} = (1 - pull) r_k + push."""
    rule = registry.build("dppf", pull=0.1, push=0.5)
    members = at(rule, [3.0, 1.0], [3.0, 3.0])
    for k, r in enumerate([1.4, 1.76, 2.084, 2.3756, 2.63804]):
        x, y = meet(rule, members, k)
        assert torch.allclose(x, torch.tensor([3.0, 2 - r], dtype=DOUBLE), atol=1e-14)
        assert torch.allclose(y, torch.tensor([3.0, 2 + r], dtype=DOUBLE), atol=1e-14)


@pytest.mark.parametrize("count,r", [(2, 0.1), (4, 30.0)])
def test_dppf_distance_goes_to_push_over_pull(count: int, r: float) -> None:
    rule = registry.build("dppf", pull=0.2, push=0.6)
    corners = torch.eye(count, dtype=DOUBLE)
    apart = corners - corners.mean(0)
    members = at(rule, *(apart * r / apart[0].norm()))
    for k in range(120):
        meet(rule, members, k)
    middle = sum(m.x for m in members) / count
    assert float(middle.abs().max()) <= 1e-12
    assert all(abs(float(m.x.norm()) - 3.0) <= 1e-9 for m in members)


def test_dppf_does_not_push_who_is_at_the_mean() -> None:
    rule = registry.build("dppf", pull=0.1, push=0.5)
    assert all(torch.equal(x, torch.ones(3, dtype=DOUBLE)) for x in meet(rule, at(rule, *[[1.0] * 3] * 2)))


# -- GRAWA ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["mgrawa", "lgrawa"])
@pytest.mark.parametrize(
    "gradients,weights",
    [
        ([(3, 4), (5, 0), (0, -5)], (1 / 3, 1 / 3, 1 / 3)), ([(0, 1), (3, 0)], (0.75, 0.25)),
        ([(1, 0), (2, 0), (0, 4)], (4 / 7, 2 / 7, 1 / 7)), ([(0, 0), (2, 0)], (1.0, 0.0)),
        ([(0, 0)] * 6, (1 / 6,) * 6), ([(0, 0), (1, 0), (0, 0)], (0.5, 0.0, 0.5)),
        ([(math.nan, 1), (0, 1), (3, 0)], (0.0, 0.75, 0.25)),
    ],
    ids=["equal", "one to three", "1, 2, 4", "a zero", "all zero", "two zeros", "not finite"],
)  # fmt: skip
def test_grawa_weighs_by_the_inverse_norm(rule: str, gradients: Any, weights: Sequence[float]) -> None:
    made = registry.build(rule, pull=0.4)
    members = with_gradients(made, *gradients, start=1.0)
    mean = sum(w * (k + 1) for k, w in enumerate(weights))
    for k, x in enumerate(meet(made, members)):
        assert torch.allclose(x, torch.full((2,), 0.6 * (k + 1) + 0.4 * mean, dtype=DOUBLE), rtol=0, atol=1e-14)


def test_grawa_of_nobody_finite_is_no_exchange() -> None:
    rule = registry.build("mgrawa")
    with pytest.raises(NonFinite):
        heard_of(rule, with_gradients(rule, (math.nan, 1), (math.inf, 0)))


def test_grawa_by_parameter_and_by_model() -> None:
    """Norms of two parameters, (1, 3) and (3, 1): alike for the model, three to one for each parameter."""
    points, found = [(0.0, 10.0), (4.0, 20.0)], {}
    for name in ("mgrawa", "lgrawa"):
        rule, members = registry.build(name, pull=1.0), []
        for (a, b), x in zip(points, [(1.0, 3.0), (3.0, 1.0)], strict=True):
            pair = nn.ModuleList(nn.Linear(1, 1, bias=False, dtype=DOUBLE) for _ in range(2))
            with torch.no_grad():
                for layer, value in zip(pair, (a, b), strict=True):
                    layer.weight.fill_(value)
            loss = lambda model, x: sum(layer(x[:, i : i + 1]).sum() for i, layer in enumerate(model))  # noqa: E731
            space, oracle = lso.attach(pair, loss, [torch.tensor([x], dtype=DOUBLE)])
            members.append(Member(space, rule.init(space), oracle))
        found[name] = meet(rule, members)[0].tolist()
    assert found["mgrawa"] == pytest.approx([2.0, 15.0]) and found["lgrawa"] == pytest.approx([1.0, 17.5])


@pytest.mark.parametrize("new", [False, True])
def test_grawas_running_mean(new: bool) -> None:
    """Of norms n1, n2 it is (b n1 + n2) / (1 + b), corrected for its beginning: of a newcomer it is n2."""
    rule = registry.build("mgrawa", decay=0.5, pull=0.0)
    members = with_gradients(rule, (6.0, 0.0), (1.0, 0.0))
    meet(rule, members, 0)
    for m, x in zip(members, (1.5, 4.0), strict=True):
        shards: Any = m.space.shards
        _, m.oracle = lso.attach(shards.module, lambda model, x: model(x).sum(), [torch.tensor([[x, 0.0]]).double()])
    one, two = 1 / ((0.5 * 6 + 1.5) / 1.5), 1 / 4 if new else 1 / ((0.5 * 1 + 4) / 1.5)
    if new:
        members[1].state.clear()
        members[1].state.update(rule.init(members[1].space))
    [(_, mean), _] = heard_of(rule, members, 1)
    assert float(mean.tensors[0][0]) == pytest.approx(two / (one + two))


def test_grawa_by_the_gradients_of_training_takes_none_more() -> None:
    rule = registry.build("mgrawa", norms="training", decay=0.5, pull=1.0)
    members = at(rule, [0.0, 0.0], [1.0, 1.0])
    for norms in ((2.0, 1.0), (4.0, 3.0)):
        for m, n in zip(members, norms, strict=True):
            gradient = m.space.zeros().add_(m.space.weights, alpha=0.0)
            gradient.tensors[0][0] = n
            rule.before_step(m.space, gradient, 4, m.state)
    one, two = 1 / ((0.5 * 2 + 4) / 1.5), 1 / ((0.5 * 1 + 3) / 1.5)
    assert all(m.oracle is None for m in members)
    for x in meet(rule, members):
        assert x.tolist() == pytest.approx([two / (one + two)] * 2)


# -- of all rules -----------------------------------------------------------------------------------------------------

EVERY = sorted({*registry.names()} - {"parle"})


@pytest.mark.parametrize("rule", EVERY)
def test_an_exchange_changes_nothing(rule: str) -> None:
    """Until it settles: where it fails on one replica, the others are as they were, and so is what they remember."""
    made = registry.build(rule, **({"tau": 4} if rule == "streaming_diloco" else {}), **_one_layer(rule))
    members = with_gradients(made, (1.0, 2.0), (2.0, 0.5), (0.1, 0.3))
    with_losses(made, members, [0.3, 0.1, 0.2])
    before = [(m.x, _copied(m.state)) for m in members]
    for number in range(2):
        heard_of(made, members, number)
    for m, (x, state) in zip(members, before, strict=True):
        assert torch.equal(m.x, x) and m.state.keys() == state.keys()
        for key, value in _copied(m.state).items():
            assert torch.equal(value, state[key]) if isinstance(value, Tensor) else value == state[key], key
    if rule != "local_sgd":
        assert [m.x.tolist() for m in members] != [x.tolist() for x in meet(made, members)], "the test sees nothing"


@pytest.mark.parametrize("rule", EVERY)
def test_the_model_that_is_evaluated_is_one(rule: str) -> None:
    """On all replicas alike, and a Vector of its own: the outer point, the centre, the mean."""
    made = registry.build(rule, **_one_layer(rule))
    points = random_points(3)
    members = [replace(m, samples=n) for m, n in zip(at(made, *points), (8, 16, 2), strict=True)]
    found = together.point(made, members)
    outer = rule in ("easgd", "eamsgd", "lsam", "diloco", "muloco", "sparseloco", "streaming_diloco")
    shares = (8 / 26, 16 / 26, 2 / 26) if rule == "local_sgd" else (1 / 3,) * 3
    wanted = points[0] if outer else sum(s * p for s, p in zip(shares, points, strict=True))
    assert all(float((p - wanted).abs().max()) <= 1e-15 for p in found)
    vector: Any = heard_of(made, members, what="point")[0]
    vector.add_(1.0)
    assert all(float((p - wanted).abs().max()) <= 1e-15 for p in together.point(made, members))


@pytest.mark.parametrize("rule", [r for r in EVERY if registry.get(r).overlap] or ["streaming_diloco"])
def test_what_overlaps_reads_copies_alone(rule: str) -> None:
    """It is exchanged in a thread while steps go on: no oracle, and what it tells is of before them."""
    made: Any = registry.build(rule, tau=4, overlap=2, **_one_layer(rule))
    members = at(made, [1.0, 2.0], [3.0, 5.0])
    told = [made.snapshot(m.space, m.state, 0) for m in members]
    for m in members:
        m.x = m.x + 100.0
    room = together.Room()
    here: Any = together.Here(room, 0, [0], [1], 0, {})
    number, delta = made.exchange(here, members[1].space, None, told[1])
    assert number == 0 and torch.cat(delta.tensors).tolist() == [-2.0, -3.0]


def test_a_late_fragment_is_told_from_the_point_that_all_have() -> None:
    """Who missed an exchange is given `old` at the next, after its snapshot: its step is told from there."""
    rule = registry.build("streaming_diloco", tau=4, overlap=0, **_one_layer("streaming_diloco"))
    [member] = at(rule, [1.0, 2.0])
    told = rule.snapshot(member.space, member.state, 0)
    given = member.space.zeros().add_(member.state["old"]).mul_(5.0)
    here: Any = together.Here(together.Room(), 0, [0], [1], 0, {})
    _, delta = rule.exchange(here, member.space, None, {**told, "old": given})
    assert torch.cat(delta.tensors).tolist() == [4.0, 8.0]


def _one_layer(rule: str) -> dict[str, Any]:
    return {"fragments": 1} if rule == "streaming_diloco" else {}


def _copied(state: dict[str, Any]) -> dict[str, Any]:
    return {k: v if isinstance(v, int | float) else torch.cat([t.clone() for t in v.tensors]) for k, v in state.items()}
