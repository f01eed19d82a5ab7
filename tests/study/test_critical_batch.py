"""The critical batch: from exact curves, with noise against scipy's fit, and where there is none."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import least_squares

from elastic_lsopt.config.compare import CompareConfig
from elastic_lsopt.study.critical_batch import critical_batch, critical_batches

pytestmark = pytest.mark.fast
BATCHES = [32, 128, 512, 2048, 16384]


def test_an_exact_curve() -> None:
    steps = [40 * (1 + 700 / b) for b in BATCHES]
    assert critical_batch(BATCHES, steps) == pytest.approx((700, 40), rel=1e-9)
    # The paper's other form, in samples.
    s, e = steps[2], steps[2] * BATCHES[2]
    assert (s / 40 - 1) * (e / (40 * 700) - 1) == pytest.approx(1)


def test_noisy_steps_against_scipy() -> None:
    draw = np.random.default_rng(0)
    steps = [40 * (1 + 700 / b) * (1 + 0.1 * draw.standard_normal()) for b in BATCHES]
    fit = least_squares(
        lambda p: p[1] * (1 + p[0] / np.array(BATCHES)) / np.array(steps) - 1, [100.0, 10.0], xtol=1e-12
    )
    assert critical_batch(BATCHES, steps) == pytest.approx(tuple(fit.x), rel=1e-5)


@pytest.mark.parametrize("steps", [[100, 90], [1600 / b for b in (16, 32, 64)], [5, 50, 500]])
def test_none(steps: list[float]) -> None:
    """Two batches; a straight 1 / B; steps that grow."""
    assert critical_batch([16, 32, 64][: len(steps)], [*map(float, steps)]) is None


def test_of_a_comparison() -> None:
    """Batches whose runs have all reached the target, of each method apart; labels without a number are left out."""
    config = CompareConfig(
        job={}, methods={"a": {}}, output_dir="-", target_loss=1.0, axes={"global_batch_size": [*BATCHES, "growing"]}
    )

    def row(method: str, batch: object, steps: float, n: int = 5) -> dict[str, object]:
        numbers = {"steps_to_target": {"mean": steps, "n": n}}
        return {"method": method, "equal": "epochs", "global_batch_size": batch, "runs": 5, "numbers": numbers}

    rows = [row("a", b, 40 * (1 + 700 / b)) for b in BATCHES] + [row("a", "growing", 1.0), row("b", 32, 9.0)]
    rows[4] = row("a", 16384, 1.0, n=4)
    [found] = critical_batches(config, rows)
    assert found["method"] == "a" and found["batches"] == BATCHES[:4]
    assert found["critical_batch"] == pytest.approx(700) and found["fewest_steps"] == pytest.approx(40)
