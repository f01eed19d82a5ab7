"""Rank correlation: tau-b against scipy and a plain double loop, the bootstrap against drawing, Psi by hand."""

from __future__ import annotations

from itertools import product
from math import isnan, sqrt

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kendalltau

from elastic_lsopt.study.ranking import bootstrap, rank, tau_b

pytestmark = pytest.mark.fast

TIED = st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=2, max_size=30)


def by_loop(x, y) -> float:
    agree = tied_x = tied_y = 0
    pairs = [(i, j) for i in range(len(x)) for j in range(i)]
    for i, j in pairs:
        s, t = np.sign(x[i] - x[j]), np.sign(y[i] - y[j])
        agree, tied_x, tied_y = agree + s * t, tied_x + (s == 0), tied_y + (t == 0)
    scale = sqrt((len(pairs) - tied_x) * (len(pairs) - tied_y))
    return agree / scale if scale else float("nan")


@given(TIED)
@settings(max_examples=100)
def test_tau_b_is_scipys_and_that_of_a_double_loop(pairs):
    x, y = zip(*pairs, strict=True)
    assert tau_b(x, y) == pytest.approx(by_loop(x, y), abs=1e-12, nan_ok=True)
    if len(set(x)) > 1 and len(set(y)) > 1:
        assert tau_b(x, y) == pytest.approx(kendalltau(x, y).statistic, abs=1e-12)


def test_published_value():
    assert tau_b([12, 2, 1, 12, 2], [1, 4, 7, 1, 0]) == pytest.approx(-0.47140452079103173, abs=1e-15)  # scipy's manual


def test_perfect_order_is_one_and_the_reverse_minus_one():
    x = np.random.default_rng(0).normal(size=40)
    assert tau_b(x, np.exp(x)) == pytest.approx(1, abs=1e-15)
    assert tau_b(x, -(x**3)) == pytest.approx(-1, abs=1e-15)
    assert bootstrap(x, np.exp(x), 200, 0.95, 0) == pytest.approx((1, 1), abs=1e-12)


@pytest.mark.parametrize("values", [[], [1.0], [2.0, 2.0, 2.0]])
def test_nothing_to_order_is_nan(values):
    assert isnan(tau_b(values, values))
    assert all(map(isnan, bootstrap(values, values, 50, 0.95, 0)))


def test_the_bootstrap_is_scipys_tau_of_the_networks_drawn():
    draw = np.random.default_rng(1)
    x, y = draw.integers(0, 6, 25), draw.normal(size=25)
    counts = np.random.default_rng(7).multinomial(25, np.full(25, 1 / 25), size=300)
    taus = [kendalltau(np.repeat(x, c), np.repeat(y, c)).statistic for c in counts]
    assert bootstrap(x, y, 300, 0.9, 7) == pytest.approx(tuple(np.quantile(taus, [0.05, 0.95])), abs=1e-12)


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    # Of a bivariate normal with correlation r, tau = 2/pi arcsin r.
    truth, inside = 2 / np.pi * np.arcsin(0.6), 0
    for trial in range(200):
        draw = np.random.default_rng(100 + trial)
        x = draw.normal(size=60)
        y = 0.6 * x + 0.8 * draw.normal(size=60)
        low, high = bootstrap(x, y, 200, 0.95, trial)
        inside += low <= truth <= high
    assert 0.88 <= inside / 200 <= 1.0


def rows(measure, gap):
    """A grid of two axes and two seeds."""
    return [
        {"width": w, "noise": n, "seed": s, "m": measure(w, n, s), "gap": gap(w, n, s)}
        for w, n, s in product((1, 2, 3), (0.0, 0.5), (0, 1))
    ]


def ranked(rows):
    return rank(rows, "m", "gap", axes=("width", "noise", "seed"), draws=50, confidence=0.95, seed=0)


def test_psi_tells_an_axis_that_is_ordered_from_one_that_is_not():
    # The measure follows the noise and goes against the width; the gap rises with both.
    found = ranked(rows(lambda w, n, s: 100 * n - w, lambda w, n, s: 100 * n + w + 0.1 * s))
    assert found.granulated == {"width": pytest.approx(-1), "noise": pytest.approx(1)}
    assert found.psi == pytest.approx(0)
    assert found.models == 12


def test_groups_without_a_difference_in_the_gap_order_nothing_and_a_constant_measure_none_of_them():
    # No gap differs by width where there is no noise: there only the noisy groups speak.
    found = ranked(rows(lambda w, n, s: w, lambda w, n, s: n * (1 + w)))
    assert found.granulated == {"width": pytest.approx(1), "noise": 0.0}
    assert isnan(ranked(rows(lambda w, n, s: w, lambda w, n, s: 1.0)).psi)


def test_networks_without_the_number_are_left_out():
    table = rows(lambda w, n, s: w + n, lambda w, n, s: w + n)
    table[0]["m"], table[1]["gap"], table[2]["m"] = None, None, float("nan")
    found = ranked(table)
    assert (found.models, found.tau) == (9, pytest.approx(1))
