"""The lines of a running job: what they count, against hand-made numbers."""

from __future__ import annotations

import pytest

from elastic_lsopt.training.reporting.console import Console, Speed, counted, duration

pytestmark = pytest.mark.fast


def test_speed_is_steady_where_steps_are_and_slow_to_believe_one():
    speed = Speed()
    assert speed.after(1000, 2.0) == pytest.approx(500)
    assert speed.after(1000, 2.0) == pytest.approx(500)
    assert 300 < speed.after(1000, 10.0) < 500  # a step that saved a checkpoint


@pytest.mark.parametrize(("number", "said"), [(7, "7"), (874.2, "874"), (41_230, "41.2k"), (1_300_000, "1.30M")])
def test_counted(number, said):
    assert counted(number) == said


@pytest.mark.parametrize(
    ("seconds", "said"), [(0, "0 s"), (119, "119 s"), (720, "12 min"), (18_000, "5 h"), (260_000, "3 d")]
)
def test_duration(seconds, said):
    assert duration(seconds) == said


def test_a_line_says_rate_batch_members_speed_memory_and_time(capsys):
    console = Console()
    console.attend(speaks=True, steps=100, done=0)
    console._per_sample = "tokens", 128
    console.step({"step": 100, "loss": 2.5, "lr": 3e-4, "batch": 32, "world": 4, "seconds": 0.5, "eval_loss": 2.0})
    line = capsys.readouterr().err
    # 32 samples of 128 tokens in half a second.
    for said in (
        "step 100/100",
        "loss 2.500",
        "held out 2.000",
        "rate 0.0003",
        "batch 32 on 4",
        "8.19k tokens/s",
        "GiB",
        "0 s left",
    ):
        assert said in line
