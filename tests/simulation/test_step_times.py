"""The last of many replicas against numerical integration, harmonic numbers and plain draws."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import integrate, stats

from elastic_lsopt.simulation.step_times import mean_of_last, sums

pytestmark = pytest.mark.fast


def integrated(below, n: int, top: float) -> float:
    """The mean of the largest of n: the integral of 1 - F^n."""
    return integrate.quad(lambda x: 1 - below(x) ** n, 0, top, limit=500, epsabs=1e-9)[0]


@pytest.mark.parametrize("n", [1, 2, 8, 1000, 100_000])
@pytest.mark.parametrize("steps", [1, 32])
def test_the_last_of_normal_times(n: int, steps: int) -> None:
    law = stats.norm(2.0 * steps, 0.1 * 2.0 * steps**0.5)
    wanted = integrated(law.cdf, n, 2.0 * steps * 2)
    assert mean_of_last([(sums("normal", 2.0, 0.1, steps), n)]) == pytest.approx(wanted, rel=2e-5)


@pytest.mark.parametrize("n", [1, 3, 50, 100_000])
def test_the_last_of_exponential_times_is_a_harmonic_number(n: int) -> None:
    harmonic = sum(1 / k for k in range(1, n + 1))
    assert mean_of_last([(sums("exponential", 3.0, 0.02, 1), n)]) == pytest.approx(3.0 * harmonic, rel=1e-3)


@pytest.mark.parametrize("n", [1, 20, 10_000])
def test_the_last_of_sums_of_exponential_times(n: int) -> None:
    wanted = integrated(stats.gamma(16, scale=0.5).cdf, n, 60)
    assert mean_of_last([(sums("exponential", 0.5, 0.02, 16), n)]) == pytest.approx(wanted, rel=1e-4)


def test_the_last_of_two_kinds() -> None:
    fast, slow = stats.norm(1, 0.1), stats.norm(1.2, 0.12)
    wanted = integrate.quad(lambda x: 1 - fast.cdf(x) ** 900 * slow.cdf(x) ** 10, 0, 3, limit=500)[0]
    table = sums("normal", 1.0, 0.1, 1)
    assert mean_of_last([(table, 900), (table.scaled(1.2), 10)]) == pytest.approx(wanted, rel=2e-5)
    sure = sums("normal", 1.5, 0.0, 1)
    assert mean_of_last([(table, 900), (sure, 1)]) == pytest.approx(1.5, rel=1e-4)


@pytest.mark.parametrize("kind,n,steps", [("normal", 4, 3), ("exponential", 4, 3), ("normal", 1, 3), ("normal", 2, 1)])
def test_first_and_last_are_drawn_as_a_plain_loop_draws_them(kind: str, n: int, steps: int) -> None:
    rng, rounds = np.random.default_rng(1), 40_000
    law = rng.normal(1, 0.2, (rounds, n, steps)) if kind == "normal" else rng.exponential(1, (rounds, n, steps))
    plain = law.sum(2)
    first, last = sums(kind, 1.0, 0.2, steps).extremes(n, np.random.default_rng(2), rounds)
    for ours, theirs in ((first, plain.min(1)), (last, plain.max(1)), (last - first, plain.max(1) - plain.min(1))):
        assert ours.mean() == pytest.approx(theirs.mean(), abs=5 * theirs.std() / rounds**0.5 + 1e-12)
        assert ours.std() == pytest.approx(theirs.std(), rel=0.03, abs=1e-12)


def test_shares_below_a_time() -> None:
    table = sums("normal", 1.0, 0.1, 4)
    for x in (3.0, 3.9, 4.0, 4.5):
        assert table.below(x) == pytest.approx(stats.norm(4, 0.2).cdf(x), rel=1e-4)
    assert table.scaled(2.0).below(8.4) == pytest.approx(stats.norm(4, 0.2).cdf(4.2), rel=1e-4)
