"""What the methods do where it can be worked out: quadratics, one more polynomial, linear models, linear losses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import elastic_lsopt as lso
from elastic_lsopt.oracle.clock import SampleClock

pytestmark = pytest.mark.fast
F64 = torch.float64
H = torch.diag(torch.tensor([10.0, 3.0, 1.0, 0.1], dtype=F64))
X = torch.tensor([1.0, -1.0, 2.0, 0.5], dtype=F64)


class Point(nn.Module):
    """The weights themselves, as a model."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(x.clone())

    def forward(self, _: Tensor) -> Tensor:
        return self.weight


def gradient(method: Any, x: Tensor = X, loss: Any = None, units: int = 1, base: Any = None) -> Tensor:
    """What a method steps with at x; the loss is x' H x / 2 unless another is given."""
    model = Point(x)
    optimizer = (base or (lambda ps: torch.optim.SGD(ps, lr=1.0)))(model.parameters())
    of = loss or (lambda w: w @ H.to(w) @ w / 2)
    engine = lso.Engine.of(
        model, optimizer, method=method, loss_fn=lambda m, b: of(m(b)), total_samples=100,
    )  # fmt: skip
    engine.train_batch([torch.zeros(1, dtype=F64) for _ in range(units)])
    return x - model.weight.detach()


def close(a: Tensor, b: Tensor, within: float = 1e-10) -> None:
    assert torch.allclose(a, b, rtol=0, atol=within), (a, b)


def test_sam_on_a_quadratic() -> None:
    """H (x + rho H x / ||H x||); of one number, h (w + rho sign w)."""
    g = H @ X
    close(gradient(lso.SAM(rho=0.3)), H @ (X + 0.3 * g / g.norm()))
    one = gradient(lso.SAM(rho=0.3), torch.tensor([-2.0], dtype=F64), lambda w: 5 * w.square().sum() / 2)
    close(one, torch.tensor([5 * (-2.0 - 0.3)], dtype=F64))


def test_gsam_on_a_quadratic() -> None:
    g = H @ X
    s = H @ (X + 0.3 * g / g.norm())
    close(gradient(lso.GSAM(rho=0.3, alpha=0.4)), s - 0.4 * (g - (g @ s) / (s @ s) * s))


def test_looksams_kept_direction_is_perpendicular() -> None:
    """A second step at the same gradient: g + alpha ||g|| v / ||v||, with v perpendicular to the first gradient."""
    model = Point(X)
    engine = lso.Engine.of(
        model, torch.optim.SGD(model.parameters(), lr=0.0), method=lso.LookSAM(rho=0.3, k=2, alpha=0.5),
        loss_fn=lambda m, b: m(b) @ H @ m(b) / 2,
    )  # fmt: skip
    g = H @ X
    s = H @ (X + 0.3 * g / g.norm())
    v = s - (s @ g) / (g @ g) * g
    for _ in range(2):
        engine.train_batch([torch.zeros(1, dtype=F64)])
    assert engine.last_step is not None and engine.last_step.passes == 1
    # The rate is 0, so the gradient is seen by its norm alone: the two parts are perpendicular.
    assert math.isclose(engine.last_step.gradient_norm, float(g.norm()) * math.sqrt(1 + 0.5**2), rel_tol=1e-9)
    close(engine.method_state["direction"].tensors[0], v / v.norm())  # type: ignore[union-attr]


def test_entropy_sgd_reaches_the_local_entropys_gradient() -> None:
    """Without noise the walk's mean tends to argmin f + gamma / 2 ||. - x||^2: w - mean = H (H + gamma I)^-1 x."""
    method = lso.EntropySGD(
        inner_steps=4000, gamma0=0.1, gamma1=0.0, noise=0.0, inner_lr=0.05, inner_momentum=0.0, batch="whole"
    )
    wanted = torch.tensor([0.990099, -0.967742, 1.818182, 0.25], dtype=F64)  # H (H + 0.1)^-1 x
    close(gradient(method), wanted, 1e-6)


@pytest.mark.parametrize("gamma0,inner_lr", [(0.03, 0.1), (3.0, 0.1), (0.03, 5.0)])
def test_entropy_sgds_pull_stays_where_the_walk_is_stable(gamma0: float, inner_lr: float) -> None:
    """gamma0 1.001^t up to 1, Parle's bound: no spring of a long run throws the walk out, and none overflows.

    Up to gamma0 itself where that is more, and to 1 / eta' where that is less than 1.
    """
    for t in (0, 1000, 3000, 6500, 8000, 720_000, 10**9):
        model = Point(torch.ones(4, dtype=F64))
        method = lso.EntropySGD(batch="whole", gamma0=gamma0, noise=0.0, inner_lr=inner_lr)
        optimizer = lso.LandscapeOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), method)

        def closure(model: Point = model, optimizer: Any = optimizer) -> Tensor:
            optimizer.zero_grad()
            loss = 0.1 * model.weight.square().sum() / 2
            loss.backward()
            return loss

        optimizer.clock = SampleClock(t, t)
        optimizer.step(closure)
        # Beyond a few thousand steps the growing pull has met its bound, whatever it is.
        gamma = min(gamma0 * 1.001 ** min(t, 10_000), max(min(1.0, 1 / inner_lr), gamma0))
        w, mean, v = 1.0, 1.0, 0.0
        for _ in range(5):  # the loop of the authors, on one of the four alike numbers
            g = 0.1 * w
            v = 0.9 * v + g
            w = w - inner_lr * (g + 0.9 * v - gamma * (1.0 - w))
            mean = 0.75 * mean + 0.25 * w
        close(model.weight.detach(), torch.full((4,), mean, dtype=F64), 1e-12)
        assert optimizer.last_step is not None and optimizer.last_step.gradient_norm < 2


def test_lpf_sgd_is_the_smoothed_gradient() -> None:
    """f = sum w^4 / 4, smoothed by N(0, s^2): its gradient is w^3 + 3 w s^2; s = gamma ||w||. Mean of 1024 draws."""
    x = torch.tensor([0.5, -0.4, 0.3], dtype=F64)
    s = 0.3 * float(x.norm())
    found = gradient(lso.LPFSGD(parts=1024, gamma=0.3, alpha=1.0), x, lambda w: w.pow(4).sum() / 4, units=1024)
    # A draw's standard deviation is below 3 w^2 s + 3 |w| s^2 sqrt 2 + s^3 sqrt 15
    error = 4 * (3 * x.square() * s + 3 * x.abs() * s**2 * 2**0.5 + s**3 * 15**0.5) / 32
    assert ((found - (x**3 + 3 * x * s**2)).abs() < error).all(), found
    assert ((found - x**3).abs() > error).any()  # the plain gradient is another


def test_momentum_sams_first_step_is_the_bases_and_the_next_looks_ahead() -> None:
    model = Point(X)
    sgd = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    engine = lso.Engine.of(model, sgd, method=lso.MomentumSAM(rho=0.3), loss_fn=lambda m, b: m(b) @ H @ m(b) / 2)
    x, v = X.clone(), torch.zeros_like(X)
    for step in range(3):
        ahead = x - 0.3 * v / v.norm() if step else x
        v = 0.9 * v + H @ ahead
        x = x - 0.01 * v
        engine.train_batch([torch.zeros(1, dtype=F64)])
        close(model.weight.detach(), x)


def test_ae_sam_decides_by_the_length_of_the_gradient() -> None:
    """d = 0.5: n = ||g||^2 of the first step is far above mean n / 2 and deviation, so that it goes up; passes tell."""
    model = Point(X)
    engine = lso.Engine.of(
        model, torch.optim.SGD(model.parameters(), lr=0.0), total_samples=100,
        method=lso.AESAM(rho=0.3, decay=0.5, lambda1=0.5, lambda2=0.5), loss_fn=lambda m, b: m(b) @ H @ m(b) / 2,
    )  # fmt: skip
    n, mean, variance, wanted, passes = float((H @ X).square().sum()), 0.0, math.exp(-10), [], []
    for _ in range(6):
        mean = 0.5 * mean + 0.5 * n
        variance = 0.5 * variance + 0.5 * (n - mean) ** 2
        wanted.append(2 if n >= mean + 0.5 * math.sqrt(variance) else 1)
        engine.train_batch([torch.zeros(1, dtype=F64)])
        assert engine.last_step is not None
        passes.append(engine.last_step.passes)
    assert passes == wanted and set(wanted) == {1, 2}


# -- Functional SAM ------------------------------------------------------------------------------------------------


def stepped(model: nn.Module, method: Any, loss: lso.Loss, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    engine = lso.Engine.of(model, torch.optim.SGD(model.parameters(), lr=1.0), method=method, loss_fn=loss)
    engine.train_batch([batch])
    return {n: before[n] - p.detach() for n, p in model.named_parameters()}


def data() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(6, 5, dtype=F64), torch.randint(0, 3, (6,))


def cross_entropy() -> lso.Loss:
    return lso.Loss(lambda m, b: m(b[0]), lambda z, b: nn.functional.cross_entropy(z, b[1]), lambda b: len(b[1]))


def deep() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def furthest(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return max(float((a[n] - b[n]).abs().max()) for n in a)


def test_functional_sam_of_a_linear_model_is_sgd() -> None:
    def model() -> nn.Module:
        torch.manual_seed(1)
        return nn.Linear(5, 3).double()

    plain = stepped(model(), lso.Plain(), cross_entropy(), data())
    assert furthest(stepped(model(), lso.FunctionalSAM(rho=0.7), cross_entropy(), data()), plain) <= 1e-12
    assert furthest(stepped(model(), lso.SAM(rho=0.7), cross_entropy(), data()), plain) > 1e-3


def test_functional_sam_of_a_loss_linear_in_the_logits_is_sam() -> None:
    c = torch.linspace(-1, 1, 18, dtype=F64).view(6, 3)
    loss = lso.Loss(lambda m, b: m(b[0]), lambda z, b: (c * z).sum() / 6, lambda b: 6.0)
    sam = stepped(deep(), lso.SAM(rho=0.7), loss, data())
    assert furthest(stepped(deep(), lso.FunctionalSAM(rho=0.7), loss, data()), sam) <= 1e-12
    assert furthest(stepped(deep(), lso.Plain(), loss, data()), sam) > 1e-3


def test_functional_sam_differs_from_sam_by_the_known_term() -> None:
    """SAM - FSAM = J(w + e)' (u(w + e) - u(w)); with the squared loss u = F - y, so J(w + e)' (F(w + e) - F(w))."""
    x, _ = data()
    y = torch.linspace(-1, 1, 18, dtype=F64).view(6, 3)
    loss = lso.Loss(lambda m, b: m(b[0]), lambda z, b: (z - y).square().sum() / 2, lambda b: 6.0)
    sam = stepped(deep(), lso.SAM(rho=0.3), loss, (x, y))
    ours = stepped(deep(), lso.FunctionalSAM(rho=0.3), loss, (x, y))
    model = deep()
    params = dict(model.named_parameters())
    here = model(x)
    g = torch.autograd.grad((here - y).square().sum() / 2, list(params.values()))
    length = math.sqrt(sum(float(t.square().sum()) for t in g))
    with torch.no_grad():
        for p, t in zip(params.values(), g, strict=True):
            p.add_(0.3 * t / length)
    there = model(x)
    term = torch.autograd.grad(there, list(params.values()), (there - here).detach())
    wanted = {n: sam[n] - t for n, t in zip(params, term, strict=True)}
    assert furthest(ours, wanted) <= 1e-10 and furthest(ours, sam) > 1e-3


def test_functional_sam_removes_the_gauss_newton_part_to_first_order() -> None:
    """(FSAM - g) / rho -> (H - GGN) g / ||g||, by products of the oracle's own exact curvature."""
    rho = 1e-5
    g = stepped(deep(), lso.Plain(), cross_entropy(), data())
    found = stepped(deep(), lso.FunctionalSAM(rho=rho), cross_entropy(), data())
    space, oracle = lso.attach(deep(), cross_entropy(), [data()])
    v = space.zeros().copy_(oracle.gradient())
    v.mul_(1 / space.norm(v))
    wanted = oracle.hvp(v) - oracle.ggn_vp(v)
    names = [p.name for p in space.layout.parameters]
    for name, t in zip(names, wanted.tensors, strict=True):
        assert ((found[name] - g[name]).flatten() / rho - t).abs().max() < 1e-4
    assert space.norm(wanted) > 1e-3
