"""Normalised measures are those of the network that the authors' code rewrites: filters divided, outputs multiplied."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import elastic_lsopt as lso
from elastic_lsopt.probes.flatness.epsilon_sharpness import epsilon_sharpness
from elastic_lsopt.probes.flatness.filter_norms import filter_norms, normalised
from elastic_lsopt.probes.flatness.fisher_rao import fisher_rao
from elastic_lsopt.probes.flatness.local_entropy import local_entropy, local_entropy_gradient
from elastic_lsopt.probes.flatness.lpf import lpf
from elastic_lsopt.probes.flatness.pac_bayes import pac_bayes
from elastic_lsopt.probes.spectrum.operator import operator
from tests.cases import engines
from tests.cases.probes.flatness import vector
from tests.oracles.paper_loops import cross_entropy


class Rectified(nn.Module):
    """Convolution, linear layers and ReLU; `rewrite` is the authors' `norm()`."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.conv = nn.Conv1d(1, 4, 3)
        self.hidden = nn.Linear(4 * 5, 6)
        self.out = nn.Linear(6, 3)
        self.double()
        self.factors: list[Tensor] = [torch.ones(1, dtype=torch.float64)] * 3

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.conv(x[:, None])) * self.factors[0].view(-1, 1)
        h = torch.relu(self.hidden(h.flatten(1))) * self.factors[1]
        return self.out(h) * self.factors[2]

    @torch.no_grad()
    def rewrite(self) -> Rectified:
        self.factors = []
        for layer in (self.conv, self.hidden, self.out):
            p = layer.weight.flatten(1).norm(dim=1) + layer.bias.abs()
            layer.weight /= p.view(-1, *[1] * (layer.weight.dim() - 1))
            layer.bias /= p
            self.factors.append(p)
        return self


def test_as_if_the_network_had_been_rewritten() -> None:
    batches = engines.batches(1, 2, size=8, dtype=torch.float64)[0]
    (space, oracle), (theirs, rewritten) = (
        lso.attach(model, cross_entropy, batches) for model in (Rectified(), Rectified().rewrite())
    )
    assert rewritten.loss() == pytest.approx(oracle.loss(), rel=1e-13)
    with torch.no_grad():
        other = Rectified()
        start = {n: 0.5 * p + 0.1 for n, p in other.named_parameters()}
        for n, p in other.named_parameters():
            p.copy_(start[n])
        start_rewritten = dict(other.rewrite().named_parameters())
    same: list[tuple[Any, Any]] = [
        (lpf(space, oracle, draws=3, normalised=True), lpf(theirs, rewritten, draws=3)),
        (epsilon_sharpness(space, oracle, normalised=True), epsilon_sharpness(theirs, rewritten)),
        (
            pac_bayes(space, oracle, draws=2, initial=vector(space, start), normalised=True),
            pac_bayes(theirs, rewritten, draws=2, initial=vector(theirs, start_rewritten)),
        ),
        (local_entropy(space, oracle, draws=3, normalised=True), local_entropy(theirs, rewritten, draws=3)),
        (
            local_entropy_gradient(space, oracle, steps=3, noise=0.1, normalised=True),
            local_entropy_gradient(theirs, rewritten, steps=3, noise=0.1),
        ),
        (fisher_rao(space, oracle), fisher_rao(theirs, rewritten)),
    ]
    for ours, authors in same:
        assert ours.value == pytest.approx(authors.value, rel=1e-8), type(ours)
    a, b = normalised(space, oracle), operator(theirs, rewritten)
    v, u = a(a.gaussian(0)), b(b.gaussian(0))
    assert theirs.norm(vector(theirs, _named(space, v)) - u) < 1e-10 * theirs.norm(u)


def test_gains_and_filters_of_zeros() -> None:
    """A norm's gain is a filter of one element with its bias; a 1-D parameter alone too; a zero keeps 1."""
    model = engines.net((), torch.float64)
    with torch.no_grad():
        model.norm.bias.copy_(torch.linspace(-1, 1, 11))
        model.first.weight[2] = 0
        model.first.bias[2] = 0
    space, _ = lso.attach(model, cross_entropy, engines.batches(1, 1, dtype=torch.float64)[0])
    p = _named(space, filter_norms(space))
    gain = model.norm.weight.detach().abs() + model.norm.bias.detach().abs()
    assert torch.allclose(p["norm.weight"], gain) and torch.allclose(p["norm.bias"], gain)
    assert p["tiny"].item() == 0.5
    assert (p["first.weight"].view(13, 7)[2] == 1).all() and p["first.bias"][2] == 1
    rows = model.last.weight.detach().norm(dim=1) + model.last.bias.detach().abs()
    assert torch.allclose(p["last.weight"].view(3, 11), rows[:, None].expand(3, 11))


def _named(space: Any, v: Any) -> dict[str, Tensor]:
    """On one rank: each parameter's elements, flat."""
    return {space.layout.parameters[x.parameter].name: t for x, t in zip(space.layout.pieces, v.tensors, strict=True)}
