"""The Fisher-Rao norm against the dense quadratic form, of all and of some parameters."""

from __future__ import annotations

import pytest
import torch

import elastic_lsopt as lso
from elastic_lsopt.probes.flatness.fisher_rao import fisher_rao
from tests.cases import engines
from tests.cases.probes.flatness import dense, quadratic, split_loss

pytestmark = pytest.mark.fast


def test_quadratic_form() -> None:
    h, w, c = dense(5)
    got = fisher_rao(*quadratic(h, w, c))
    assert got.value == pytest.approx(float(w @ h @ w), rel=1e-12)
    assert got.products == 1 and got.relative_error is None


def test_of_some_parameters_and_of_the_gauss_newton_matrix() -> None:
    model, batch = engines.net((), torch.float64), engines.batches(1, 1, dtype=torch.float64)[0]
    space, oracle = lso.attach(model, split_loss(), batch)
    x, y = batch[0]
    weight = model.last.weight.detach().clone()

    def loss(last: torch.Tensor) -> torch.Tensor:
        z = torch.func.functional_call(model, {"last.weight": last}, (x,))
        return torch.nn.functional.cross_entropy(z, y)

    h = torch.autograd.functional.hessian(loss, weight).reshape(33, 33)
    expected = float(weight.reshape(-1) @ h @ weight.reshape(-1))
    # Linear in the logits: there both matrices are the same.
    assert fisher_rao(space, oracle, parameters="last.weight").value == pytest.approx(expected, rel=1e-10)
    assert fisher_rao(space, oracle, of="ggn", parameters="last.weight").value == pytest.approx(expected, rel=1e-10)
