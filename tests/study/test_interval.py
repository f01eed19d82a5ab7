"""Student's t against scipy's."""

from __future__ import annotations

import math

import pytest
from scipy import stats

from elastic_lsopt.study.interval import interval, probability, quantile

pytestmark = pytest.mark.fast


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 5, 9, 10, 30])
def test_the_distribution_is_scipys(degrees: int) -> None:
    for t in (0.0, 0.3, 1.0, 2.5, 12.0):
        assert probability(t, degrees) == pytest.approx(stats.t.cdf(t, degrees), abs=1e-12)
    for p in (0.6, 0.95, 0.975, 0.995):
        assert quantile(p, degrees) == pytest.approx(stats.t.ppf(p, degrees), rel=1e-10)


def test_the_interval_is_scipys() -> None:
    values = [0.31, 0.28, 0.35, 0.30, 0.27]
    low, high = stats.t.interval(0.9, 4, loc=sum(values) / 5, scale=stats.sem(values))
    found = interval(values, 0.9)
    assert (found.mean - found.half, found.mean + found.half, found.n) == (pytest.approx(low), pytest.approx(high), 5)


def test_of_one_value_there_is_none() -> None:
    assert interval([2.0]).mean == 2.0 and math.isnan(interval([2.0]).half) and math.isnan(interval([]).mean)
