"""GRAWA's norms against autograd."""

from __future__ import annotations

import pytest
import torch

import elastic_lsopt as lso
from elastic_lsopt.probes.flatness.gradient_norm import gradient_norm
from tests.cases import engines
from tests.oracles import paper_loops

pytestmark = pytest.mark.fast


def test_norms_and_their_sum() -> None:
    model, units = engines.net(("tied",), torch.float64), engines.batches(1, 3, last=2, dtype=torch.float64)[0]
    space, oracle = lso.attach(engines.net(("tied",), torch.float64), paper_loops.cross_entropy, units)
    got = gradient_norm(space, oracle)
    loss, g = paper_loops.gradient(model, units, paper_loops.by_samples(units))
    assert got.loss == pytest.approx(loss) and got.value == pytest.approx(paper_loops.norm(list(g.values())))
    assert got.norms == pytest.approx({n: float(t.norm()) for n, t in g.items()})
    assert got.sum_of_norms == pytest.approx(sum(float(t.norm()) for t in g.values()))
