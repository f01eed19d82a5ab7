"""The edge of stability: descent on a quadratic diverges exactly above a ratio of 1; Adam against dense matrices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import elastic_lsopt as lso
from elastic_lsopt import UserError
from elastic_lsopt.backends.detect import backend_for
from elastic_lsopt.probes.trajectory.edge_of_stability import adam_edge_of_stability, edge_of_stability, preconditioned
from tests.cases import engines
from tests.cases.probes.flatness import Quadratic, dense, mean, quadratic
from tests.oracles.paper_loops import cross_entropy


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("ratio", [0.97, 1.03])
def test_descent_diverges_exactly_above_one(ratio: float, momentum: float) -> None:
    """torch's own SGD, full batch."""
    h, w, _ = dense(5)
    rate = ratio * 2 * (1 + momentum) / float(torch.linalg.eigvalsh(h)[-1])
    got = edge_of_stability(*quadratic(h, w), learning_rate=rate, momentum=momentum)
    assert got.value == pytest.approx(ratio, rel=1e-6)
    assert got.threshold == pytest.approx(2 * (1 + momentum) / rate) and got.products >= 1
    model = Quadratic(h, w)
    sgd = torch.optim.SGD(model.parameters(), lr=rate, momentum=momentum)
    for _ in range(600):
        sgd.zero_grad()
        model(torch.zeros(1, 5, dtype=torch.float64)).sum().backward()
        sgd.step()
    assert (float(model.w.detach().norm()) > float(w.norm())) == (ratio > 1)


def adam_after(steps: int, w: Tensor, h: Tensor, betas: tuple[float, float], eps: float) -> tuple[Any, Any, Tensor]:
    """Space, oracle and second moment of a quadratic that Adam has gone `steps` on."""
    model = Quadratic(h, w)
    adam = torch.optim.Adam(model.parameters(), lr=1e-2, betas=betas, eps=eps)
    engine = lso.Engine(backend_for(model, adam, max_grad_norm=0.0), lso.Plain(), loss_fn=mean)
    x = (torch.zeros(1, len(w), dtype=torch.float64),)
    for _ in range(steps):
        engine.train_batch([x])
    return *lso.attach(engine, None, [x]), adam.state[model.w]["exp_avg_sq"].clone()


@pytest.mark.fast
@pytest.mark.parametrize("ratio", [0.97, 1.03])
@pytest.mark.parametrize("steps", [1, 7])
def test_adam_against_the_dense_matrix_and_its_own_recurrence(steps: int, ratio: float) -> None:
    """D frozen: m = b1 m + (1 - b1) g, w -= eta D^-1 m diverges exactly above one."""
    h, w, _ = dense(5)
    betas, eps = (0.9, 0.99), 1e-3
    space, oracle, v = adam_after(steps, w, h, betas, eps)
    d = (1 - betas[0] ** steps) * ((v / (1 - betas[1] ** steps)).sqrt() + eps)
    largest = float(torch.linalg.eigvals(h / d[:, None]).real.max())
    rate = ratio * 38 / largest
    got = adam_edge_of_stability(space, oracle, learning_rate=rate, steps=steps, betas=betas, eps=eps)
    assert got.largest == pytest.approx(largest, rel=1e-6) and got.value == pytest.approx(ratio, rel=1e-6)
    a = preconditioned(space, oracle, steps=steps, betas=betas, eps=eps)
    u = a.gaussian(0)
    assert torch.allclose(a(u).tensors[0], (h / d.sqrt() / d.sqrt()[:, None]) @ u.tensors[0])
    x, m = w.clone(), torch.zeros_like(w)
    for _ in range(1500):
        m = 0.9 * m + 0.1 * (h @ x)
        x = x - rate * m / d
    assert (float(x.norm()) > float(w.norm())) == (ratio > 1)


@pytest.mark.fast
def test_bad_input() -> None:
    h, w, _ = dense(3)
    space, oracle = quadratic(h, w)
    for bad in ({"learning_rate": 0.0}, {"momentum": 1.0}, {"momentum": -0.1}):
        with pytest.raises(UserError, match=f"^{next(iter(bad))}=.* must be .*$"):
            edge_of_stability(space, oracle, **{"learning_rate": 0.1, **bad})
    for bad in ({"steps": 0}, {"eps": 0.0}, {"betas": (1.0, 0.9)}, {"betas": (0.9, 1.0)}):
        with pytest.raises(UserError, match="must be"):
            adam_edge_of_stability(space, oracle, **{"learning_rate": 0.1, "steps": 1, **bad})  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"^the base optimizer keeps no exp_avg_sq: use Adam or AdamW"):
        adam_edge_of_stability(space, oracle, learning_rate=0.1, steps=1)
    net = engines.net((), torch.float64)
    fresh = lso.Engine(backend_for(net, torch.optim.AdamW(net.parameters())), lso.Plain(), loss_fn=cross_entropy)
    with pytest.raises(UserError, match="take a step first"):
        batch = engines.batches(1, 1, dtype=torch.float64)[0]
        adam_edge_of_stability(*lso.attach(fresh, None, batch), learning_rate=0.1, steps=1)


def test_the_same_at_every_world_size(ranks: Any) -> None:
    case = "tests.cases.probes.flatness:edges"
    one = ranks(1).run(case, kind="plain")[0]
    for world in (1, 2, 3):
        for got in ranks(world).run(case, kind="fsdp2"):
            assert got == pytest.approx(one, rel=1e-6), world
