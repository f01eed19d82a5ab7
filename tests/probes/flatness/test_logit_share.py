"""The logits' share of what SAM adds: its two limits in closed form, and against plain autograd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import elastic_lsopt as lso
from elastic_lsopt.probes.flatness.logit_share import logit_share
from tests.cases.probes.flatness import split_loss

pytestmark = pytest.mark.fast


def net() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(4)
    return torch.randn(10, 4).double(), torch.randint(0, 3, (10,))


def test_against_autograd() -> None:
    """u and J by hand at both points: the parts are their products."""
    rho, (x, y) = 0.3, batch()
    model = net()
    names, start = zip(*((n, p.detach().clone()) for n, p in model.named_parameters()), strict=True)
    sizes = [p.numel() for p in start]

    def logits(flat: Tensor) -> Tensor:
        pieces = [v.view_as(p) for v, p in zip(flat.split(sizes), start, strict=True)]
        return functional_call(model, dict(zip(names, pieces, strict=True)), (x,)).reshape(-1)

    def by_logits(flat: Tensor) -> Tensor:
        z = logits(flat).detach().requires_grad_()
        return torch.autograd.grad(nn.functional.cross_entropy(z.view(10, 3), y), z)[0]

    w = torch.cat([p.reshape(-1) for p in start])
    jacobian = torch.func.jacrev(logits)
    g = jacobian(w).T @ by_logits(w)
    up = w + rho * g / g.norm()
    logit, f = jacobian(up).T @ (by_logits(up) - by_logits(w)), (jacobian(up) - jacobian(w)).T @ by_logits(w)
    d = logit + f
    got = logit_share(*lso.attach(model, split_loss(), [(x, y)]), rho=rho)
    assert got.value == pytest.approx(float(logit @ d / (d @ d)), rel=1e-8)
    assert got.logit_length == pytest.approx(float(logit.norm() / d.norm()), rel=1e-7)
    assert got.functional_length == pytest.approx(float(f.norm() / d.norm()), rel=1e-8)
    assert 0.05 < got.value < 0.95, "a test of shares needs both parts"


def test_logits_that_are_linear_in_the_weights_have_all_of_it() -> None:
    torch.manual_seed(0)
    got = logit_share(*lso.attach(nn.Linear(4, 3).double(), split_loss(), [batch()]))
    assert got.value == pytest.approx(1.0, abs=1e-10) and got.functional_length < 1e-10


def test_a_loss_that_is_linear_in_the_logits_leaves_none() -> None:
    loss = lso.Loss(
        forward=lambda model, b: model(b[0]),
        criterion=lambda z, b: -z.gather(1, b[1][:, None]).mean(),
        count=lambda b: float(len(b[1])),
    )
    got = logit_share(*lso.attach(net(), loss, [batch()]))
    assert got.value == pytest.approx(0.0, abs=1e-10) and got.logit_length < 1e-7


def test_refusals() -> None:
    whole = lso.attach(net(), lambda model, b: nn.functional.cross_entropy(model(b[0]), b[1]), [batch()])
    with pytest.raises(lso.UserError, match=r"lso\.Loss"):
        logit_share(*whole)
    with pytest.raises(lso.UserError, match="rho=0 must be a number > 0"):
        logit_share(*lso.attach(net(), split_loss(), [batch()]), rho=0)
