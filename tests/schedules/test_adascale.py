"""The gain against a plain numpy loop and on a quadratic whose signal and noise are known."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import elastic_lsopt as lso
from elastic_lsopt.backends.replicated import Replicated
from elastic_lsopt.oracle.family import Kept
from elastic_lsopt.schedules.adascale import Gain, GainMonitor, measured
from elastic_lsopt.space.geometry import ParameterSpace
from elastic_lsopt.space.vector import Vector

pytestmark = pytest.mark.fast

POSITIVE = st.floats(1e-6, 1e6)


def space_of(elements: int) -> ParameterSpace:
    model = nn.ParameterList([nn.Parameter(torch.zeros(elements, dtype=torch.float64))])
    return ParameterSpace(Replicated(model.named_parameters(), None, model=model))


def vector(space: ParameterSpace, values: np.ndarray) -> Vector:
    out = space.empty()
    out.tensors[0].copy_(torch.from_numpy(values))
    return out


@given(variance=POSITIVE, square=POSITIVE, batch=st.integers(1, 1000), k=st.integers(1, 64))
def test_the_gain_lies_between_one_and_k(variance: float, square: float, batch: int, k: int) -> None:
    gain = Gain(variance, square)
    var = variance / batch
    assert gain.ratio(batch, batch * k) == pytest.approx((var + square) / (var / k + square))
    assert 1 - 1e-12 <= gain.ratio(batch, batch * k) <= k + 1e-9
    assert gain.ratio(batch, batch) == 1.0
    assert gain.ratio(batch, 2 * batch * k) >= gain.ratio(batch, batch * k)


def test_the_ends_of_the_gain() -> None:
    assert Gain(0.0, 1.0).ratio(32, 320) == 1.0 and Gain(0.0, 0.0).ratio(32, 320) == 1.0
    assert Gain(5.0, 0.0).ratio(32, 320) == pytest.approx(10.0)
    assert Gain(32.0, 1.0).ratio(32, 64) == pytest.approx(4 / 3)  # at the noise scale, twice the batch is worth 4/3
    assert (Gain(32.0, 1.0).noise_scale, Gain(1.0, 0.0).noise_scale) == (32.0, math.inf)


def found(state: Any) -> Gain | None:
    """What is measured of an engine that keeps this state."""
    kept = Kept(GainMonitor(horizon_samples=1.0), space_of(2))
    kept.load_state_dict(state)
    return measured({"gain": kept})


def test_it_is_the_plain_loop() -> None:
    rng, space = np.random.default_rng(0), space_of(7)
    monitor = GainMonitor(horizon_samples=100.0)
    state = monitor.init(space)
    assert found(state) is None
    variance = square = weight = 0.0
    before: tuple[np.ndarray, int] | None = None
    for batch in (8, 8, 32, 5, 16, 16):
        g = rng.standard_normal(7) + 1.0
        monitor.before_step(space, vector(space, g), batch, state)
        if before is not None:
            last, last_batch = before
            keep = math.exp(-batch / 100.0)
            variance = keep * variance + (1 - keep) * np.sum((g - last) ** 2) / (1 / batch + 1 / last_batch)
            square = keep * square + (1 - keep) * np.sum(g * last)
            weight = keep * weight + 1 - keep
        before = g, batch
    gain = found(state)
    assert gain is not None
    assert (gain.variance, gain.square) == pytest.approx((variance / weight, square / weight))


@pytest.mark.long
@pytest.mark.parametrize("batches", [(16, 16), (8, 64)], ids=["one batch", "two batches in turn"])
def test_known_noise_on_a_quadratic(batches: tuple[int, int]) -> None:
    """L = |w|^2 / 2 at |w|^2 = 4 with noise of variance 0.5 an element and sample: S = 200 x 0.5, whatever the batch.

    5,000 steps: the estimate of S spreads by sqrt(3 / (200 x 5000)) = 0.2 %, that of |G|^2 by about 1 %; 5 spreads.
    """
    n, rng = 200, np.random.default_rng(1)
    space, w = space_of(n), np.full(n, 2 / math.sqrt(n))
    monitor = GainMonitor(horizon_samples=1e7)
    state = monitor.init(space)
    for step in range(5000):
        batch = batches[step % 2]
        g = w + math.sqrt(0.5 / batch) * rng.standard_normal(n)
        monitor.before_step(space, vector(space, g), batch, state)
    gain = found(state)
    assert gain is not None
    assert gain.variance == pytest.approx(100.0, rel=0.01)
    assert gain.square == pytest.approx(4.0, rel=0.05)
    assert gain.ratio(25, 50) == pytest.approx(4 / 3, rel=0.02)


def test_its_state_is_vectors_and_numbers() -> None:
    """The steps are those of the method alone; what it remembers is its Vector and numbers, on the engine's space."""
    torch.manual_seed(0)
    x, y = torch.randn(8, 3), torch.randn(8, 1)

    def run(wrap: bool) -> Any:
        torch.manual_seed(1)
        model = nn.Linear(3, 1)
        keep = [GainMonitor(horizon_samples=100.0)] if wrap else []
        from elastic_lsopt.backends.detect import backend_for

        backend = backend_for(model, torch.optim.SGD(model.parameters(), lr=0.1))
        engine = lso.Engine(backend, lso.SAM(rho=0.1), loss_fn=lambda m, b: ((m(b[0]) - b[1]) ** 2).mean(), keep=keep)
        for _ in range(4):
            engine.train_batch([(x[:4], y[:4]), (x[4:], y[4:])])
        return engine

    plain, engine = run(False), run(True)
    assert all(torch.equal(a, b) for a, b in zip(plain.module.parameters(), engine.module.parameters(), strict=True))
    state = engine.families["gain"].state_dict()
    assert {type(v) for v in state.values()} == {Vector, float, int} and state["previous_batch"] == 8
    gain = measured(engine.families)
    assert gain is not None and gain.square > 0
    assert measured(plain.families) is None


def test_a_non_finite_gradient_is_passed_over_and_a_wrong_horizon_refused() -> None:
    space = space_of(2)
    monitor = GainMonitor(horizon_samples=1.0)
    state = GainMonitor(horizon_samples=1.0).init(space)
    for values in ([1.0, 0.0], [math.nan, 0.0], [1.0, 0.0]):
        monitor.before_step(space, vector(space, np.array(values)), 4, state)
    assert found(state) == Gain(variance=0.0, square=1.0)
    with pytest.raises(ValueError, match="horizon_samples=0"):
        GainMonitor(horizon_samples=0)
