"""Mean Valley on a quadratic: the distance to the wall is the root of a quadratic equation."""

from __future__ import annotations

from math import sqrt
from statistics import fmean

import pytest
import torch

from elastic_lsopt import NonFinite, UserError
from elastic_lsopt.probes.flatness.mean_valley import mean_valley
from tests.cases.probes.flatness import dense, quadratic, vector

pytestmark = pytest.mark.fast


@pytest.mark.parametrize("kappa", [1.001, 2.0, 100.0])
def test_closed_form(kappa: float) -> None:
    """f t'Ht/2 + t g'd = (kappa - 1) f(x_A), from weights that are somewhere else."""
    h, w, c = dense(5)
    space, oracle = quadratic(h, w, c, offset=10.0)
    torch.manual_seed(8)
    x = torch.randn(3, 5, dtype=torch.float64)
    got = mean_valley(space, oracle, workers=[vector(space, {"w": row}) for row in x], kappa=kappa, tolerance=1e-10)
    mean = x.mean(0)
    base, g = float(mean @ h @ mean / 2 + c @ mean + 10), h @ mean + c
    widths = []
    for row in x:
        d = (row - mean) / (row - mean).norm()
        first, second = float(g @ d), float(d @ h @ d)
        widths.append((-first + sqrt(first**2 + 2 * second * (kappa - 1) * base)) / second)
    assert got.widths == pytest.approx(widths, rel=1e-8) and got.value == pytest.approx(fmean(widths), rel=1e-8)
    assert got.inverse == pytest.approx(1 / fmean(widths)) and got.loss == pytest.approx(base)
    assert got.relaxation == pytest.approx(float((x - mean).norm(dim=1).mean()))
    assert torch.equal(space.weights.tensors[0], w)


def test_bad_input() -> None:
    h, w, c = dense(5)
    space, oracle = quadratic(h, w, c, offset=10.0)
    one, two = space.weights.clone(), space.zeros()
    for bad in ({"kappa": 1.0}, {"kappa": float("nan")}, {"step": 0.0}, {"tolerance": 0.0}):
        with pytest.raises(UserError, match=f"^{next(iter(bad))}=.* must be a number > .*$"):
            mean_valley(space, oracle, workers=[one, two], **bad)
    with pytest.raises(UserError, match=r"^workers has 1 entries; a mean valley needs at least 2.$"):
        mean_valley(space, oracle, workers=[one])
    with pytest.raises(UserError, match=r"^worker 0 is at the mean of the workers"):
        mean_valley(space, oracle, workers=[one, one])
    with pytest.raises(UserError, match=r"^the loss at the mean of the workers is -"):
        mean_valley(*(bad := quadratic(h, w, c, offset=-99.0)), workers=[vector(bad[0], {"w": r}) for r in (w, -w)])
    with pytest.raises(UserError, match=r"^the loss never grows 2.0-fold towards worker 0; use a smaller kappa.$"):
        flat = quadratic(0 * h, w, 0 * c, offset=1.0)
        mean_valley(*flat, workers=[vector(flat[0], {"w": r}) for r in (w, -w)])
    with pytest.raises(NonFinite):
        nan = quadratic(h, w, c, offset=float("nan"))
        mean_valley(*nan, workers=[vector(nan[0], {"w": r}) for r in (w, -w)])
    assert torch.equal(space.weights.tensors[0], w)
