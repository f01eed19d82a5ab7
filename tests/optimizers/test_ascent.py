"""The options of the way up, which all of SAM's family share: what is moved, how far, when, along what."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import elastic_lsopt as lso

pytestmark = pytest.mark.fast


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.first, self.norm, self.last = nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(torch.tanh(self.first(x))))


def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(6)
    return torch.randn(8, 4, dtype=torch.float64), torch.randint(0, 3, (8,))


def loss_fn(model: Any, b: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(b[0]), b[1])


def seen(method: Any, base: Any = None, steps: int = 1, total: int | None = 8) -> list[dict[str, Tensor]]:
    """e of each forward of the last step: the weights that it saw, less those of the step."""
    model = Net().double()
    engine = lso.Engine.of(
        model, (base or (lambda ps: torch.optim.SGD(ps, lr=0.1)))(model.named_parameters()), method=method,
        loss_fn=loss_fn, total_samples=None if total is None else total * steps,
    )  # fmt: skip
    points: list[dict[str, Tensor]] = []
    model.register_forward_pre_hook(
        lambda *_: points.append({n: p.detach().clone() for n, p in model.named_parameters()})
    )
    for _ in range(steps):
        points.clear()
        engine.train_batch([batch()])
    return [{n: p[n] - points[0][n] for n in p} for p in points]


def gradient() -> dict[str, Tensor]:
    model = Net().double()
    loss_fn(model, batch()).backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def length(of: Any) -> float:
    return math.sqrt(sum(float(t.square().sum()) for t in of))


@pytest.mark.parametrize(
    "perturb,moved",
    [
        ({"exclude": ["norm.*"]}, ("first.weight", "first.bias", "last.weight", "last.bias")),
        ({"exclude": "*bias"}, ("first.weight", "norm.weight", "last.weight")),
        ({"match": ["first.*", "last.*"], "dims": 2}, ("first.weight", "last.weight")),
        ({"dims": 1}, ("first.bias", "norm.weight", "norm.bias", "last.bias")),
    ],
)
@pytest.mark.parametrize("method", [lso.SAM, lso.ASAM])
def test_which_parameters_move(perturb: dict[str, Any], moved: tuple[str, ...], method: Any) -> None:
    _, e = seen(method(rho=0.2, perturb=perturb))
    assert {n for n, t in e.items() if t.abs().max() > 0} == {*moved}
    if method is lso.SAM:
        g = gradient()
        whole = length(g[n] for n in moved)
        assert all(torch.allclose(e[n], 0.2 * g[n] / whole, rtol=0, atol=1e-12) for n in moved)


@pytest.mark.parametrize("radius", ["parameter", "row"])
def test_lengths_of_what_moves(radius: Any) -> None:
    _, e = seen(lso.SAM(rho=0.2, radius=radius, perturb={"exclude": "norm.*"}))
    assert float(e["norm.weight"].abs().max()) == 0
    rows = e["first.weight"] if radius == "row" else [e["first.weight"]]
    assert all(math.isclose(float(row.norm()), 0.2, rel_tol=1e-9) for row in rows)


def test_noise_spares_what_is_excluded() -> None:
    for method in (lso.LPFSGD(parts=1, gamma=0.1, alpha=1.0, perturb={"exclude": "norm.*"}), lso.RandomSAM(rho=0.2)):
        model = Net().double()
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        engine = lso.Engine.of(model, torch.optim.SGD(model.parameters(), lr=0.1), method=method, loss_fn=loss_fn)
        at: dict[str, Tensor] = {}
        model.register_forward_pre_hook(
            lambda *_, model=model, at=at: at.update({n: p.detach().clone() for n, p in model.named_parameters()})
        )
        engine.train_batch([batch()])
        e = {n: at[n] - before[n] for n in at}
        assert float(e["first.weight"].abs().max()) > 0
        if isinstance(method, lso.LPFSGD):
            assert float(e["norm.weight"].abs().max()) == 0
        else:
            assert math.isclose(length(e.values()), 0.2, rel_tol=1e-9)


@pytest.mark.parametrize(
    "shape,at", [("linear", [0.1, 0.2, 0.3, 0.4]), ("cosine", None), ("step", [0.1, 0.5, 0.5, 0.5])]
)
def test_rho_moves_with_the_run(shape: str, at: list[float] | None) -> None:
    """On steps 0 to 3 of 4: linear from 0.1 to 0.5, half a cosine, and a step after the first quarter is begun."""
    rho: Any = {"start": 0.1, "end": 0.5, "shape": shape}
    wanted = at or [0.1 + 0.4 * (1 - math.cos(math.pi * t / 4)) / 2 for t in range(4)]
    for step in range(4):
        model = Net().double()
        engine = lso.Engine.of(
            model, torch.optim.SGD(model.parameters(), lr=0.0), method=lso.SAM(rho=rho), loss_fn=loss_fn,
            total_samples=32,
        )  # fmt: skip
        points: list[list[Tensor]] = []
        model.register_forward_pre_hook(
            lambda *_, model=model, points=points: points.append([p.detach().clone() for p in model.parameters()])
        )
        for _ in range(step + 1):
            points.clear()
            engine.train_batch([batch()])
        e = length(a - b for a, b in zip(points[1], points[0], strict=True))
        assert math.isclose(e, wanted[step], rel_tol=1e-9), (step, e)


def test_every_and_passes() -> None:
    assert [len(seen(lso.SAM(rho=0.1, every=3), steps=n)) for n in (1, 2, 3, 4)] == [2, 1, 1, 2]
    assert [len(seen(lso.LookSAM(rho=0.1, k=2), steps=n)) for n in (1, 2, 3)] == [2, 1, 2]
    assert [len(seen(lso.MomentumSAM(rho=0.1), base=momentum, steps=n)) for n in (1, 2)] == [1, 1]


def momentum(ps: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(ps, lr=0.1, momentum=0.9)


def adamw(ps: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(ps, lr=0.01, betas=(0.9, 0.99), eps=1e-8)


def ours(ps: Any) -> torch.optim.Optimizer:
    """Through our own adapter, beside another rule; each group has a b2 of its own."""
    named = list(ps)
    groups = [{"params": [named[0][1]], "update": "lamb"}, {"params": [p for _, p in named[1:]], "betas": (0.9, 0.99)}]
    return lso.UpdateOptimizer(groups, "AdamW", lr=0.01)


MOMENTS: dict[str, tuple[Any, Any]] = {
    "adamw": (adamw, lambda v, g, t, first: (0.99 * v + 0.01 * g**2, 1 - 0.99**t)),
    "ours": (ours, lambda v, g, t, first: (
        (0.999 * v + 0.001 * g**2, 1 - 0.999**t) if first else (0.99 * v + 0.01 * g**2, 1 - 0.99**t)
    )),
    "rmsprop": (lambda ps: torch.optim.RMSprop(ps, lr=0.01, alpha=0.9),
                lambda v, g, t, first: (0.9 * v + 0.1 * g**2, 1.0)),
    "adagrad": (lambda ps: torch.optim.Adagrad(ps, lr=0.01, initial_accumulator_value=0.0),
                lambda v, g, t, first: (v + g**2, 1.0)),
}  # fmt: skip
"""A base, and by its definition (v after step t with gradient g, its divisor); first: of the first parameter."""


@pytest.mark.parametrize("kind", ["adam", "adam_metric"])
@pytest.mark.parametrize("base", MOMENTS)
@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_preconditioned_by_the_second_moment_of_the_coming_step(kind: Any, base: str, clip: float) -> None:
    """q = g / (sqrt v + 1e-8), v as a step with g, clipped, would make it; ||e|| = rho, or e' sqrt(v) e = rho^2."""
    build, after = MOMENTS[base]
    steps, rho = 4, 0.2
    model = Net().double()
    named = list(model.named_parameters())
    engine = lso.Engine.of(
        model, build(iter(named)), method=lso.SAM(rho=rho, precondition=kind), loss_fn=loss_fn, max_grad_norm=clip
    )
    twin, v = copy.deepcopy(model), {n: torch.zeros_like(p) for n, p in named}
    points: list[dict[str, Tensor]] = []
    model.register_forward_pre_hook(
        lambda *_: points.append({n: p.detach().clone() for n, p in model.named_parameters()})
    )

    def clipped(g: dict[str, Tensor]) -> dict[str, Tensor]:
        factor = min(clip / (length(g.values()) + 1e-6), 1.0) if clip else 1.0
        return {n: factor * t for n, t in g.items()}

    for t in range(1, steps + 1):
        points.clear()
        engine.train_batch([batch()])
        g = at(twin, points[0])
        coming = {n: after(v[n], u, t, n == named[0][0]) for n, u in clipped(g).items()}
        root = {n: (sum_ / over).sqrt() + 1e-8 for n, (sum_, over) in coming.items()}
        q = {n: g[n] / root[n] for n in v}
        whole = length(q.values()) if kind == "adam" else math.sqrt(sum(float((g[n] * q[n]).sum()) for n in v))
        for n in v:
            assert torch.allclose(points[1][n] - points[0][n], rho * q[n] / whole, rtol=0, atol=1e-11), (t, n)
        up = clipped(at(twin, points[1]))
        v = {n: after(v[n], up[n], t, n == named[0][0])[0] for n in v}


def second_step(method: Any, **of_base: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of two steps, the first weight's far smaller in the second, and e / ||e|| of that."""
    w, seen, scale = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64)), list[Tensor](), [1.0]
    base = torch.optim.AdamW([w], lr=1e-3, betas=(0.9, 0.5), weight_decay=0.0, **of_base)
    optimizer = lso.LandscapeOptimizer(base, method)

    def closure() -> Tensor:
        optimizer.zero_grad()
        seen.append(w.detach().clone())
        loss = (w[0] ** 2 * scale[0] + w[1] ** 2) / 2
        loss.backward()
        return loss

    optimizer.step(closure)
    scale[0] = 1e-3
    optimizer.step(closure)
    e = seen[3] - seen[2]
    return seen[0], seen[2] * torch.tensor([1e-3, 1.0], dtype=torch.float64), e / e.norm()


def test_preconditioned_by_the_largest_moment_of_amsgrad() -> None:
    """v falls after a large gradient, and AMSGrad's root does not: v of the first step divides in the second."""
    g1, g2, along = second_step(lso.SAM(rho=1e-9, precondition="adam"), amsgrad=True)
    q = g2 / ((torch.maximum(0.5 * g1**2, 0.25 * g1**2 + 0.5 * g2**2) / 0.75).sqrt() + 1e-8)
    assert torch.allclose(along, q / q.norm(), rtol=0, atol=1e-5)


def test_friendly_sams_root_is_the_gradients_and_not_its_directions() -> None:
    g1, g2, along = second_step(lso.FriendlySAM(rho=1e-9, sigma=0.5, precondition="adam"))
    q = (g2 - 0.5 * g1) / (((0.25 * g1**2 + 0.5 * g2**2) / 0.75).sqrt() + 1e-8)
    assert torch.allclose(along, q / q.norm(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["adam", "adam_metric"])
@pytest.mark.parametrize("method", [lso.SAM, lso.FriendlySAM, lso.GSAM, lso.LookSAM, lso.WSAM])
def test_what_has_no_moment_yet_takes_no_more_than_its_share(kind: Any, method: Any) -> None:
    """Row 7 is used in step 25 for the first time: in no step is e longer than Adam's roots allow, or of one row."""
    torch.manual_seed(0)
    model = nn.Embedding(10, 4)
    optimizer = lso.LandscapeOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-3), method(precondition=kind))
    points: list[Tensor] = []
    for step in range(26):
        rows = torch.tensor([0, 1, 2] + [7] * (step == 25))
        points.clear()

        def closure(rows: Tensor = rows) -> Tensor:
            optimizer.zero_grad()
            points.append(model.weight.detach().clone())
            loss = model(rows).square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        if len(points) > 1:
            e = points[1] - points[0]
            assert float(e.norm()) <= (0.0501 if kind == "adam" else 0.5), (step, e.norm())
            others = float(e[:3].norm())
    assert len(points) == 2  # LookSAM's interval is 5
    # g / root: about 1 in old rows, at most sqrt((1 - b2^26) / (1 - b2)) = 5.1 in a new one
    # (Friendly SAM's own way up is what is new in the gradient: here, row 7.)
    assert method is lso.FriendlySAM or others > float(e[7].norm()) / 8


def at(model: nn.Module, point: dict[str, Tensor]) -> dict[str, Tensor]:
    model.load_state_dict(point)
    model.zero_grad()
    loss_fn(model, batch()).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


REFUSED: list[tuple[Any, Any, str]] = [
    (lso.MomentumSAM, lambda ps: torch.optim.SGD(ps, lr=0.1),
     "MomentumSAM needs a base that keeps momentum, and the base is SGD without momentum; give one that has"),
    (lambda: lso.SAM(precondition="adam"), momentum,
     "SAM needs a base that keeps second moments, and the base is SGD; give one that has (AdamW, Adam, RMSprop, LAMB)"),
    (lso.SAMPa, adamw, "SAMPa needs SGD, and the base is AdamW; give torch.optim.SGD"),
    (lso.FunctionalSAM, momentum, "FunctionalSAM needs the logits: the logits need the loss in two steps"),
    (lso.ESAM, momentum, "ESAM needs the logits: the logits need the loss in two steps"),
    (lambda: lso.SAM(perturb={"exclude": ["*nrm*"]}), momentum, "perturb: no parameter matches '*nrm*'; names are"),
    (lambda: lso.GSAM(perturb={"dims": 7}), momentum, "perturb: no parameter is left to move (match=['*'], exclude="),
    (lambda: lso.SAM(perturb={"only": "*"}), momentum, "perturb has no key 'only'; A schedule"),
    (lambda: lso.SAM(rho={"start": 0.1}), momentum, "rho={'start': 0.1} has no end; give start and end"),
    (lambda: lso.SAM(rho={"start": 0.1, "end": 1, "shape": "sine"}), momentum, "rho.shape='sine' must be one of"),
    (lambda: lso.SAM(rho={"start": 0.1, "end": 1, "after": 1}), momentum, "rho: after=1 and until=1.0 must be shares"),
    (lambda: lso.RandomSAM(precondition="adam"), adamw, "precondition='adam' must be none: noise has no gradient"),
    (lambda: lso.SAM(precondition="adam_metric", radius="row"), adamw, "radius='row' must be model where precondition"),
    (lambda: lso.LookSAM(every=2), momentum, "every=2 must be 1: looksam's own interval is k"),
    (lambda: lso.WSAM(gamma=1.0), momentum, "gamma=1.0 must be a number >= 0 and < 1"),
    (lambda: lso.ESAM(beta=0.0), momentum, "beta=0.0 must be a number > 0 and <= 1"),
    (lambda: lso.RWP(alpha=1.5), momentum, "alpha=1.5 must be a number in [0, 1]"),
    (lambda: lso.EntropySGD(inner_lr=0.0), momentum, "inner_lr=0.0 must be a number > 0"),
    (lambda: lso.EntropySGD(gamma0=25.0), momentum, "gamma0=25.0 must be a number < 2 / inner_lr = 20"),
    (lambda: lso.EntropySGD(inner_steps=-1), momentum, "inner_steps=-1 must be a whole number >= 0"),
]  # fmt: skip


@pytest.mark.parametrize("method,base,says", REFUSED, ids=[says[:24] for *_, says in REFUSED])
def test_refused_at_construction_in_one_line(method: Any, base: Any, says: str) -> None:
    model = Net().double()
    with pytest.raises(lso.UserError) as caught:
        lso.Engine.of(model, base(model.named_parameters()), method=method(), loss_fn=loss_fn)
    assert str(caught.value).startswith(says.replace("A schedule", "")) and "\n" not in str(caught.value), caught.value


@dataclass(frozen=True, kw_only=True)
class Drifting:
    """A method of a user's: the gradient and a constant, written into the borrowed gradient or a Vector of its own."""

    borrowed: bool
    parts = 1

    def init(self, space: Any) -> dict[str, Any]:
        return {}

    def gradient(self, space: Any, oracle: Any, state: Any) -> Any:
        g = oracle.gradient()
        one = space.zeros()
        for t in one.tensors:
            t.fill_(1.0)
        return (g if self.borrowed else g.clone()).add_(one)


@pytest.mark.parametrize("base", ["torch", "ours"])
@pytest.mark.parametrize(
    "method", [lso.LookSAM(k=2, rho=0.5), Drifting(borrowed=True), Drifting(borrowed=False), lso.EntropySGD(noise=1.0)]
)
def test_a_parameter_that_no_pass_of_the_step_used_is_left_alone(base: str, method: Any) -> None:
    """By both kinds of base, and the norm is that of what moved."""
    a, b = nn.Parameter(torch.tensor([1.0, 2.0])), nn.Parameter(torch.tensor([3.0, 1.0]))
    sgd = torch.optim.SGD([a, b], lr=0.1) if base == "torch" else lso.UpdateOptimizer([a, b], "SGD", lr=0.1)
    optimizer, both = lso.LandscapeOptimizer(sgd, method), [True]

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (a**4).sum() * 0.01
        if both[0]:
            loss = loss + (b**4).sum() * 0.01
        loss.backward()
        return loss

    closures = [closure] * method.parts
    optimizer.step(closures)
    before, both[0] = (a.detach().clone(), b.detach().clone()), False
    optimizer.step(closures)
    assert optimizer.last_step is not None and torch.equal(b, before[1])
    assert math.isclose(optimizer.last_step.gradient_norm, float((a - before[0]).norm()) / 0.1, rel_tol=1e-4)


@pytest.mark.parametrize("base", ["torch", "ours"])
@pytest.mark.parametrize("borrowed", [True, False])
def test_what_only_an_earlier_pass_of_the_step_used_moves(base: str, borrowed: bool) -> None:
    """A method in two parts, each of which uses another parameter: the sum is stepped with, wherever it is written."""

    @dataclass(frozen=True, kw_only=True)
    class Summed:
        parts = 2

        def init(self, space: Any) -> dict[str, Any]:
            return {}

        def gradient(self, space: Any, oracle: Any, state: Any) -> Any:
            first, second = oracle.parts(2)
            g = oracle.gradient(first).clone()
            return oracle.gradient(second).add_(g) if borrowed else g.add_(oracle.gradient(second))

    ps = [nn.Parameter(torch.tensor([1.0, 2.0])), nn.Parameter(torch.tensor([3.0, 1.0]))]
    sgd = torch.optim.SGD(ps, lr=0.1) if base == "torch" else lso.UpdateOptimizer(ps, "SGD", lr=0.1)
    optimizer = lso.LandscapeOptimizer(sgd, Summed())

    def closure(p: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = (p**2).sum() / 2
        loss.backward()
        return loss

    optimizer.step([lambda p=p: closure(p) for p in ps])
    for p, was in zip(ps, ([1.0, 2.0], [3.0, 1.0]), strict=True):
        assert torch.allclose(p, 0.9 * torch.tensor(was))
    assert optimizer.last_step is not None
    assert math.isclose(optimizer.last_step.gradient_norm, math.sqrt(15), rel_tol=1e-6)


def schedule_free(ps: Any) -> torch.optim.Optimizer:
    return lso.UpdateOptimizer(ps, "schedule_free", lr=0.1, form="sgd")


class Factors(nn.Module):
    """The factors of one layer by the names that peft gives them."""

    def __init__(self) -> None:
        super().__init__()
        factors = {"lora_A": nn.Linear(4, 2, bias=False), "lora_B": nn.Linear(2, 3, bias=False)}
        self.layer = nn.ModuleDict(factors)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer["lora_B"](self.layer["lora_A"](x))


@pytest.mark.parametrize("method", [lso.WSAM(), lso.NBAR(alpha=0.5)])
@pytest.mark.parametrize("door", ["optimizer", "engine"])
def test_a_method_that_moves_weights_itself_is_refused_over_schedule_free(method: Any, door: str) -> None:
    """What it adds to y alone would never come to z, and so not to x, which is evaluated."""
    model = Factors().double()
    name = "wsam" if isinstance(method, lso.WSAM) else "nbar"
    with pytest.raises(
        lso.UserError, match=f"^{name} moves weights itself, and schedule_free keeps them in other"
    ) as e:
        if door == "optimizer":
            lso.LandscapeOptimizer(schedule_free(model.named_parameters()), method)
        else:
            lso.Engine.of(model, schedule_free(model.named_parameters()), method=method, loss_fn=loss_fn)
    assert "\n" not in str(e.value) and ("decouple" in str(e.value)) == (name == "wsam")


def test_coupled_wsam_is_not_refused_over_schedule_free() -> None:
    """With gamma = 1/2 it is SAM: the same steps."""
    ends = []
    for method in (lso.SAM(rho=0.2), lso.WSAM(rho=0.2, gamma=0.5, decouple=False)):
        model = Net().double()
        engine = lso.Engine.of(model, schedule_free(model.named_parameters()), method=method, loss_fn=loss_fn)
        for _ in range(3):
            engine.train_batch([batch()])
        ends.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in zip(*ends, strict=True))


def rising(ps: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(ps, lr=0.1, maximize=True)


def rising_update(ps: Any) -> torch.optim.Optimizer:
    return lso.UpdateOptimizer(ps, "AdamW", lr=0.1, maximize=True)


@pytest.mark.parametrize("method", [lso.SAM, lso.WSAM, lso.SAMPa, lso.LPFSGD, lso.EntropySGD])
@pytest.mark.parametrize("base", [rising, rising_update])
@pytest.mark.parametrize("door", ["optimizer", "engine"])
def test_a_base_that_maximizes_is_refused(method: Any, base: Any, door: str) -> None:
    """No method turns its way up, and the sign of what it moves itself, for a loss that is to grow."""
    model, says = (
        Net().double(),
        r"^param group 0 has maximize=True, and \w+ is made for a loss that is minimized",
    )
    with pytest.raises(lso.UserError, match=says):
        if door == "optimizer":
            lso.LandscapeOptimizer(base(model.parameters()), method(), total_samples=8)
        else:
            lso.Engine.of(model, base(model.parameters()), method=method(), loss_fn=loss_fn, total_samples=8)


def test_a_group_that_maximizes_is_refused_when_it_is_added_or_changed() -> None:
    w, b = (nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = lso.LandscapeOptimizer(torch.optim.SGD([w], lr=0.1), lso.SAM())

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = sum((p.square().sum() for group in optimizer.param_groups for p in group["params"]), torch.zeros(()))
        loss.backward()
        return loss

    optimizer.step(closure)
    with pytest.raises(lso.UserError, match=r"^a param group has maximize=True, and SAM"):
        optimizer.add_param_group({"params": [b], "maximize": True})
    optimizer.step(closure)
    assert len(optimizer.param_groups) == 1
    optimizer.base.add_param_group({"params": [b], "maximize": True})
    with pytest.raises(lso.UserError, match=r"^param group 1 has maximize=True, and SAM"):
        optimizer.step(closure)
    optimizer.param_groups[1]["maximize"] = False
    optimizer.step(closure)
    before = w.detach().clone()
    optimizer.param_groups[0]["maximize"] = True
    with pytest.raises(lso.UserError, match=r"^param group 0 has maximize=True, and SAM"):
        optimizer.step(closure)
    assert torch.equal(before, w)


def test_without_a_method_a_base_may_maximize_but_not_beside_an_update_that_cannot() -> None:
    """none: w + lr dL/dw. LAMB has no such entry, and would go down where the other group goes up."""
    w, b = (nn.Parameter(torch.full((2, 2), 2.0)) for _ in range(2))
    optimizer = lso.LandscapeOptimizer(torch.optim.SGD([w], lr=0.1, maximize=True), lso.Plain())

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = -w.square().sum() / 2
        loss.backward()
        return loss

    optimizer.step(closure)
    assert torch.allclose(w, torch.full((2, 2), 1.8))
    groups = [{"params": [w], "update": "lamb"}, {"params": [b]}]
    mixed = lso.UpdateOptimizer(groups, "AdamW", lr=0.1, maximize=True)
    with pytest.raises(lso.UserError, match=r"^param group 1 has maximize=True, and the update of group 0, lamb,"):
        lso.LandscapeOptimizer(mixed, lso.Plain())


def test_a_schedule_needs_the_length_of_the_run() -> None:
    with pytest.raises(lso.UserError, match=r"^rho=\{'start': 0.1, 'end': 0.2\} moves over the run, whose length"):
        seen(lso.SAM(rho={"start": 0.1, "end": 0.2}), total=None)


IN_PARTS = [
    lso.MicroSAM(rho=0.2, parts=2), lso.MicroSAM(rho=0.2, parts=2, every=2), lso.RWP(gamma=0.05),
    lso.LPFSGD(parts=2, gamma=0.05, alpha=1.0), lso.EntropySGD(inner_steps=2),
]  # fmt: skip


@pytest.mark.parametrize("method", IN_PARTS, ids=lambda m: f"{type(m).__name__}-{getattr(m, 'every', 1)}")
@pytest.mark.parametrize("accumulated", [False, True])
def test_closures_in_parts(method: Any, accumulated: bool) -> None:
    """A closure a part, in steps that go up and in those that do not, is what an engine does with the micro-batches."""
    one, other = Net().double(), Net().double()
    x, y = batch()
    halves = [(x[:4], y[:4]), (x[4:], y[4:])]
    engine = lso.Engine.of(one, torch.optim.SGD(one.named_parameters(), lr=0.1), method=method, loss_fn=loss_fn)
    optimizer = lso.LandscapeOptimizer(torch.optim.SGD(other.named_parameters(), lr=0.1), method)

    def closure(b: tuple[Tensor, Tensor]) -> Any:
        def run() -> Tensor:
            optimizer.zero_grad()
            loss = loss_fn(other, b) / (2 if accumulated else 1)
            loss.backward()
            return loss

        return run

    for _ in range(3):
        engine.train_batch(halves)
        closures = [closure(half) for half in halves]
        if accumulated:
            optimizer.accumulate(closures[0])
            optimizer.step(optimizer.accumulate(closures[1]))
        else:
            optimizer.step(closures)
        assert optimizer.last_step is not None and engine.last_step is not None
        assert optimizer.last_step.passes == engine.last_step.passes
        for p, q in zip(one.parameters(), other.parameters(), strict=True):
            assert (p - q).abs().max() < 1e-12


def test_what_a_closure_cannot_give() -> None:
    model = Net().double()
    with pytest.raises(lso.UserError, match="needs the logits, which a closure does not give"):
        lso.LandscapeOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), lso.FunctionalSAM())


def test_a_gradient_too_large_for_the_step_moves_nothing_beforehand() -> None:
    """Decoupled WSAM moves the weights just before the base steps: not where the step is about to be left out."""
    model = Net().double()
    engine = lso.Engine.of(
        model, torch.optim.SGD(model.parameters(), lr=0.1), method=lso.WSAM(rho=0.1),
        loss_fn=lambda m, b: loss_fn(m, b) * 1e30,
    )  # fmt: skip
    before = [p.detach().clone() for p in model.parameters()]
    engine.train_batch([batch()])
    assert engine.last_step is not None and engine.last_step.skipped and engine.method_state == {}
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_rwp_where_an_update_has_one_micro_batch_only() -> None:
    """As the Trainer's last update of an epoch may: both gradients are then of that micro-batch."""
    from elastic_lsopt.api.trainer.trainer_oracle import TrainerOracle

    model = Net().double()
    engine = lso.Engine.of(model, torch.optim.SGD(model.parameters(), lr=0.1), loss_fn=loss_fn)

    def run(b: tuple[Tensor, Tensor]) -> Tensor:
        loss = loss_fn(model, b)
        loss.backward()
        return loss

    oracle = TrainerOracle(engine.space, engine.backend, engine.clock, run, [batch()])
    found = lso.RWP(gamma=0.0, alpha=0.3).gradient(engine.space, oracle, {})
    wanted = gradient()
    for piece, t in zip(engine.space.layout.pieces, found.tensors, strict=True):
        name = engine.space.layout.parameters[piece.parameter].name
        assert torch.allclose(t, wanted[name].flatten(), rtol=0, atol=1e-12)


def test_looksam_forgets_a_direction_that_it_could_not_finish() -> None:
    """Its second pass is not finite: the steps up to the next k-th are the base's, not led by a raw gradient."""
    model, plain = Net().double(), Net().double()
    forwards = 0

    def second_fails(m: Any, b: tuple[Tensor, Tensor]) -> Tensor:
        nonlocal forwards
        forwards += 1
        return loss_fn(m, b) * (math.nan if forwards == 2 else 1.0)

    base = torch.optim.SGD(model.parameters(), lr=0.1)
    engine = lso.Engine.of(model, base, method=lso.LookSAM(rho=0.1, k=3, alpha=0.5), loss_fn=second_fails)
    sgd = torch.optim.SGD(plain.parameters(), lr=0.1)
    for step in range(3):
        engine.train_batch([batch()])
        assert engine.last_step is not None and engine.last_step.skipped == (step == 0)
        if step:
            sgd.zero_grad()
            loss_fn(plain, batch()).backward()
            sgd.step()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=0, atol=1e-12)


@pytest.mark.parametrize("door", ["optimizer", "engine"])
@pytest.mark.parametrize(
    "method,keep,says",
    [
        (lso.SAM(rho={"start": 0.0, "end": 0.1}), None, "rho={'start': 0.0, 'end': 0.1} moves over the run, whose"),
        (lso.AESAM(), None, "c (from lambda2 to lambda1)={'start': 1.0, 'end': -1.0} moves over the run, whose length"),
        (lso.LPFSGD(), None, "gamma (a number with alpha: 1)={'start': 0.0005, 'end': 0.0075, 'shape': 'cos"),
        (lso.SAM(), "swa", "swa: 0.75 of the run is asked for, whose length is not known"),
    ],
)  # fmt: skip
def test_a_run_of_unknown_length_is_refused_when_it_is_built(method: Any, keep: Any, says: str, door: str) -> None:
    model = Net().double()
    base = torch.optim.SGD(model.named_parameters(), lr=0.1)
    kept = [lso.averages.build(keep)] if keep else []
    with pytest.raises(lso.UserError) as caught:
        if door == "engine":
            lso.Engine.of(model, base, method=method, loss_fn=loss_fn, keep=kept)
        else:
            lso.LandscapeOptimizer(base, method, keep=kept)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_ae_sam_with_one_threshold_needs_no_length() -> None:
    assert len(seen(lso.AESAM(rho=0.2, lambda1=-1e9, lambda2=-1e9), total=None)) == 2
