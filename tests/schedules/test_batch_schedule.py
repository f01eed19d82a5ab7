"""The batch as a function of committed samples, and what a measured noise scale decides."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from elastic_lsopt.backends.replicated import Replicated
from elastic_lsopt.oracle.clock import SampleClock, steps_between
from elastic_lsopt.oracle.family import Kept
from elastic_lsopt.oracle.step_report import StepReport
from elastic_lsopt.schedules.adascale import Gain
from elastic_lsopt.schedules.batch_schedule import Ramp, Steps
from elastic_lsopt.schedules.noise_scale_batch import NoiseScaleBatch, batch_now
from elastic_lsopt.space.geometry import ParameterSpace

pytestmark = pytest.mark.fast


def megatron(start: int, increment: int, ramp: int, last: int, consumed: int) -> int:
    """Megatron-LM's --rampup-batch-size START INCREMENT SAMPLES, as its documentation says it."""
    stages = (last - start) // increment
    if consumed > ramp:
        return last
    return min(start + int(consumed / (ramp / stages)) * increment, last)


@given(stages=st.integers(1, 40), start=st.integers(1, 8), unit=st.integers(1, 7), ramp=st.integers(1, 5000),
       consumed=st.integers(0, 6000))  # fmt: skip
def test_a_ramp_is_megatrons(stages: int, start: int, unit: int, ramp: int, consumed: int) -> None:
    first, last = start * unit, (start + stages) * unit
    ours = Ramp(first=first, last=last, samples=ramp, microbatch=unit).at(consumed)
    theirs = megatron(first, unit, ramp, last, consumed)
    on_a_stage = consumed * stages % ramp == 0  # where their division of floats may be a bit short of a whole one
    assert theirs in ((ours, ours - unit) if on_a_stage else (ours,))


def test_a_ramp_may_fall_and_ends() -> None:
    ramp = Ramp(first=8, last=2, samples=60, microbatch=2)
    assert [ramp.at(s) for s in (0, 19, 20, 40, 59, 60, 10_000)] == [8, 8, 6, 4, 4, 2, 2]


def test_steps() -> None:
    steps = Steps(first=4, changes=((10.0, 8), (20.5, 16)))
    assert [steps.at(s) for s in (0, 9, 10, 20, 21, 1000)] == [4, 4, 8, 8, 16, 16]
    # 4 + 4 + 4 = 12; 12 + 8 = 20; 20 + 8 = 28; 28 + 16 = 44
    assert steps_between(steps.at, 0, 44) == 6 and steps_between(steps.at, 28, 29) == 1


BATCH: dict[str, Any] = {
    "smallest": 8, "largest": 64, "microbatch": 4, "every_samples": 100, "horizon_samples": 100.0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("own", "batch", "scale", "wanted"),
    [
        ({}, 8, 12.0, 12), ({}, 8, 13.9, 12), ({}, 8, 14.1, 16), ({}, 8, 9.0, 8),  # nearest whole micro-batches
        ({}, 16, 18.1, 20), ({}, 20, 24.0, 20), ({}, 20, 26.1, 28),  # 24 / 20 is below the hysteresis of 1.25
        ({}, 8, 1e9, 16), ({}, 8, math.inf, 16), ({"growth": 8.0}, 8, 1e9, 64), ({"growth": 100.0}, 8, 1e9, 64),
        ({}, 32, 4.0, 32), ({"may_shrink": True}, 32, 20.0, 20), ({"may_shrink": True}, 32, 0.0, 16),
        ({"may_shrink": True}, 12, 0.0, 8), ({"multiple": 0.5}, 8, 24.0, 12), ({"hysteresis": 1.0}, 20, 24.0, 24),
    ],
)  # fmt: skip
def test_what_a_measurement_decides(own: dict[str, Any], batch: int, scale: float, wanted: int) -> None:
    gain = Gain(scale, 1.0) if math.isfinite(scale) else Gain(1.0, 0.0)
    assert NoiseScaleBatch(**BATCH | own).decided(batch, gain) == wanted


@given(batch=st.integers(2, 16).map(lambda n: 4 * n), scale=st.floats(0, 1e6), shrink=st.booleans())
def test_it_stays_within_its_bounds(batch: int, scale: float, shrink: bool) -> None:
    found = NoiseScaleBatch(**BATCH, may_shrink=shrink).decided(batch, Gain(scale, 1.0))
    assert 8 <= found <= 64 and found % 4 == 0 and (shrink or found >= batch)
    assert batch / 2 - 4 < found < batch * 2 + 4  # and whole micro-batches


def test_windows_of_the_clock_follow_from_committed_samples() -> None:
    clock = SampleClock(samples=130, total_samples=200)
    assert (clock.window(50), clock.window(50, first=100), clock.window(50, first=131)) == (2, 0, -1)
    assert clock.at_share(0.25) == 50.0 and SampleClock().at_share(0.0) == 0.0


def test_the_batch_of_known_noise_is_that_of_a_plain_loop() -> None:
    """|G|^2 = 4 and S = 96, so B_noise = 24: gradients of four samples at first, looked at every 64 samples."""
    n, rng = 4000, np.random.default_rng(3)
    weights = nn.Parameter(torch.zeros(n, dtype=torch.float64))
    space = ParameterSpace(Replicated(nn.ParameterList([weights]).named_parameters(), None, model=None))
    rule = NoiseScaleBatch(smallest=4, largest=64, microbatch=4, every_samples=64, horizon_samples=200.0)
    family, clock, mean = Kept(rule, space), SampleClock(), np.full(n, 2 / math.sqrt(n))
    last: tuple[np.ndarray[Any, Any], int] | None = None
    variance = square = weight = 0.0
    batch, look, batches = 4, 64, []
    for _ in range(60):
        assert batch_now({"gain": family}, 4) == batch
        gradient = space.empty()
        g = mean + math.sqrt(96 / n / batch) * rng.standard_normal(n)
        gradient.tensors[0].copy_(torch.from_numpy(g))
        rule.before_step(space, gradient, batch, family.state)
        clock = clock.advanced(batch)
        rule.after_step(space, StepReport(0.0, 1, 0.0, batch, False, clock=clock), family.state)
        if last is not None:
            keep = math.exp(-batch / 200)
            of_step = np.sum((g - last[0]) ** 2) / (1 / batch + 1 / last[1])
            variance, square = keep * variance + (1 - keep) * of_step, keep * square + (1 - keep) * float(g @ last[0])
            weight = keep * weight + 1 - keep
        last = g, batch
        batches.append(batch)
        if clock.samples >= look and weight:
            look = clock.samples // 64 * 64 + 64
            wanted = min(max(variance / square, batch), 2 * batch, 64)
            wanted = round(wanted / 4) * 4
            batch = wanted if wanted >= 1.25 * batch else batch
    assert batches[0] == 4 and batches[-1] in (20, 24, 28) and {*batches} >= {4, 8, 16}
