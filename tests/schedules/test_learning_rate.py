"""The learning rate against closed forms and against transformers' own schedules."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from elastic_lsopt.errors import UserError
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


SHAPES: dict[str, dict[str, Any]] = {
    "constant": {}, "linear": {}, "cosine": {}, "inverse_sqrt": {"timescale_samples": 64},
    "warmup_stable_decay": {"decay_ratio": 0.3, "decay_type": "linear"},
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_it_rises_on_a_line_from_zero(shape: Any) -> None:
    rate = LearningRate(peak=2.0, shape=shape, warmup=0.1, **SHAPES[shape])
    assert [at(rate, s) for s in (0, 25, 50, 100)] == pytest.approx([0.0, 0.5, 1.0, 2.0])


@pytest.mark.parametrize(
    ("warmup", "shape", "own", "name", "theirs"),
    [
        (4, "linear", {}, "linear", {}), (4, "cosine", {}, "cosine", {}), (0, "linear", {}, "linear", {}),
        (4, "constant", {}, "constant_with_warmup", {}), (4, "inverse_sqrt", {}, "inverse_sqrt", {}),
        *((w, "inverse_sqrt", {"timescale_samples": 40}, "inverse_sqrt", {"timescale": 5}) for w in (0, 4)),
        *(
            (w, "warmup_stable_decay", {"decay_ratio": 0.3, "decay_type": how, "min_lr_ratio": low},
             "warmup_stable_decay", {"num_decay_steps": 6, "decay_type": how, "min_lr_ratio": low})
            for how in ("linear", "cosine", "1-sqrt")
            for w, low in ((4, 0.0), (0, 0.1))  # its warm-up begins at min_lr_ratio, ours at 0
        ),
    ],
)  # fmt: skip
def test_in_steps_it_is_transformers_schedule(
    warmup: int, shape: Any, own: dict[str, Any], name: str, theirs: dict[str, Any]
) -> None:
    from transformers import get_scheduler

    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.3)
    schedule = get_scheduler(name, optimizer, warmup, 20, scheduler_specific_kwargs=theirs)
    ours = LearningRate(peak=0.3, shape=shape, warmup=warmup / 20, **own)
    for step in range(20):
        assert at(ours, step * 8, total=160) == pytest.approx(schedule.get_last_lr()[0], abs=1e-12), step
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize("shape", SHAPES)
def test_any_batches_that_come_to_the_same_sample_find_the_same_rate(shape: Any) -> None:
    """Law 6: the rate is a function of committed samples, not of the steps that led there."""
    rate = LearningRate(peak=1.0, shape=shape, warmup=0.1, **SHAPES[shape])
    by_batch = {}
    for batch in (8, 24, 40):
        clock = SampleClock(total_samples=960)
        while clock.samples < 960:
            by_batch.setdefault(clock.samples, []).append(rate.at(clock))
            clock = clock.advanced(batch)
    assert any(len(rates) == 3 for rates in by_batch.values())
    assert all(len(set(rates)) == 1 for rates in by_batch.values())


def test_a_run_of_unknown_length_stays_at_its_start() -> None:
    assert at(LearningRate(peak=1.0, shape="linear"), 500, total=None) == 1.0
    assert at(LearningRate(peak=1.0, shape="inverse_sqrt", timescale_samples=100), 300, total=None) == 0.5


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"shape": "inverse_sqrt"}, "inverse_sqrt needs timescale_samples"),
        ({"shape": "warmup_stable_decay", "decay_ratio": 0.0}, "decay_ratio=0 must be > 0"),
        (
            {"shape": "warmup_stable_decay", "decay_ratio": 0.6, "warmup": 0.5},
            "decay_ratio=0.6 .* warm-up's 0.5, at most",
        ),
    ],
)
def test_refused(wrong: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        LearningRate(peak=1.0, **wrong)
