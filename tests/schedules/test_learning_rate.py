"""The learning rate against closed forms and against transformers' own schedules."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from elastic_lsopt.oracle.clock import SampleClock
from elastic_lsopt.schedules.learning_rate import LearningRate

pytestmark = pytest.mark.fast


def at(rate: LearningRate, samples: int, total: int | None = 1000) -> float:
    return rate.at(SampleClock(samples=samples, steps=0, total_samples=total))


@pytest.mark.parametrize(
    ("shape", "samples", "expected"),
    [
        ("constant", 100, 1.0), ("constant", 1000, 1.0),
        ("linear", 200, 1.0), ("linear", 600, 0.5), ("linear", 1000, 0.0),
        ("cosine", 200, 1.0), ("cosine", 600, 0.5), ("cosine", 400, (1 + math.sqrt(0.5)) / 2), ("cosine", 1000, 0.0),
    ],
)  # fmt: skip
def test_closed_forms(shape: Any, samples: int, expected: float) -> None:
    warmup = 0.0 if shape == "constant" else 0.2
    assert at(LearningRate(peak=3.0, shape=shape, warmup=warmup), samples) == pytest.approx(3.0 * expected, abs=1e-12)


@pytest.mark.parametrize("shape", ["constant", "linear", "cosine"])
def test_it_rises_on_a_line_from_zero(shape: Any) -> None:
    rate = LearningRate(peak=2.0, shape=shape, warmup=0.1)
    assert [at(rate, s) for s in (0, 25, 50, 100)] == pytest.approx([0.0, 0.5, 1.0, 2.0])


@pytest.mark.parametrize(
    ("shape", "name"), [("linear", "linear"), ("cosine", "cosine"), ("constant", "constant_with_warmup")]
)
def test_in_steps_it_is_transformers_schedule(shape: Any, name: str) -> None:
    from transformers import get_scheduler

    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.3)
    theirs = get_scheduler(name, optimizer, num_warmup_steps=4, num_training_steps=20)
    ours = LearningRate(peak=0.3, shape=shape, warmup=0.2)
    for step in range(20):
        assert at(ours, step * 8, total=160) == pytest.approx(theirs.get_last_lr()[0], abs=1e-12), step
        optimizer.step()
        theirs.step()


def test_a_run_of_unknown_length_stays_at_its_start() -> None:
    assert at(LearningRate(peak=1.0, shape="linear"), 500, total=None) == 1.0
