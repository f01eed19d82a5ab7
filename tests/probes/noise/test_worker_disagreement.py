"""Worker disagreement against a dense singular value decomposition, and on local SGD with known sharp directions."""

from __future__ import annotations

import pytest
import torch

from elastic_lsopt import UserError
from elastic_lsopt.probes.noise.worker_disagreement import worker_disagreement
from elastic_lsopt.space.basis import Basis
from tests.cases.probes.flatness import dense, quadratic, vector

pytestmark = pytest.mark.fast
N = 8


def test_directions_strengths_and_shares() -> None:
    h, w, c = dense(N)
    space, oracle = quadratic(h, w, c)
    torch.manual_seed(12)
    x = torch.randn(2, 3, N, dtype=torch.float64)
    rounds = [[vector(space, {"w": row}) for row in r] for r in x]
    top = torch.linalg.qr(torch.randn(N, 2, dtype=torch.float64)).Q.T
    known = Basis(space, 2)
    for row in top:
        known.append(vector(space, {"w": row}))
    got = worker_disagreement(space, oracle, rounds=rounds, eigenvectors=known)
    d = (x - x.mean(1, keepdim=True)).reshape(6, N)
    _, s, v = torch.linalg.svd(d)
    assert len(got.directions) == 4  # two rounds, each of three deltas that sum to 0
    assert got.strengths == pytest.approx((s[:4] ** 2 / 6).tolist())
    q = torch.stack([row.tensors[0] for row in got.directions])
    assert torch.allclose(q @ q.T, torch.eye(4, dtype=torch.float64), atol=1e-10)
    assert torch.allclose((q @ v[:4].T).abs(), torch.eye(4, dtype=torch.float64), atol=1e-8)
    g = h @ w + c
    assert got.captured == pytest.approx(((v[:4] @ g) ** 2).cumsum(0).div(g @ g).tolist())
    part = top.T @ (top @ g)
    assert got.captured_of_eigenspace == pytest.approx(float((q @ part).square().sum() / (part @ part)))
    assert torch.allclose(got.gram, d @ d.T)
    first = worker_disagreement(space, oracle, rounds=rounds, keep=1)
    assert len(first.directions) == 1 and first.strengths == got.strengths[:1]


def test_local_sgd_comes_apart_where_the_curvature_is() -> None:
    """A few steps with gradient noise of covariance H, as near a minimum: the first direction is the sharpest."""
    values = torch.tensor([30.0, *[0.3] * (N - 1)], dtype=torch.float64)
    basis = torch.linalg.qr(dense(N)[0]).Q
    h = basis * values @ basis.T
    space, oracle = quadratic(h, dense(N)[1])
    torch.manual_seed(13)
    ends = torch.zeros(8, N, dtype=torch.float64)
    for _ in range(4):
        noise = torch.randn(8, N, dtype=torch.float64) * values.sqrt() @ basis.T
        ends = ends - 0.002 * (ends @ h + noise)
    got = worker_disagreement(space, oracle, rounds=[[vector(space, {"w": x}) for x in ends]])
    assert abs(float(got.directions[0].tensors[0] @ basis[:, 0])) > 0.95


def test_bad_input() -> None:
    h, w, c = dense(N)
    space, oracle = quadratic(h, w, c)
    x = space.weights.clone()
    for rounds in ([], [[x]]):
        with pytest.raises(UserError, match=r"^rounds must hold the weights of at least 2 workers each"):
            worker_disagreement(space, oracle, rounds=rounds)
    with pytest.raises(UserError, match=r"^all workers hold the same weights"):
        worker_disagreement(space, oracle, rounds=[[x, x]])
    with pytest.raises(UserError, match=r"^keep=0 must be >= 1.$"):
        worker_disagreement(space, oracle, rounds=[[x, space.zeros()]], keep=0)
    still, at_rest = quadratic(h, torch.zeros_like(w))
    with pytest.raises(UserError, match=r"^the gradient is 0"):
        worker_disagreement(still, at_rest, rounds=[[vector(still, {"w": w}), still.zeros()]])
