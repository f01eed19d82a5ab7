"""What an exported model says of itself."""

from __future__ import annotations

import pytest
import yaml

import elastic_lsopt as lso
from elastic_lsopt.config.settings import TrainConfig
from elastic_lsopt.oracle.clock import SampleClock
from elastic_lsopt.training.reporting.model_card import model_card


@pytest.mark.fast
def test_the_card_names_data_method_clock_and_members() -> None:
    config = TrainConfig(dataset="/data/secret place/news.jsonl", output_dir="/home/me/runs/a", max_steps=3,
                         model_name_or_path="/models/base", seed=4)  # fmt: skip
    journal = [
        {"time": 0, "step": 0, "workers": ["a", "b"], "why": "start"},
        {"time": 60, "step": 2, "workers": ["a"], "why": "b died"},
    ]
    card = model_card(
        config, method=lso.SAM(rho=0.05), base="AdamW", clock=SampleClock(samples=96, steps=3), parameters=1234567,
        held_out_loss=1.25, journal=journal,
    )  # fmt: skip
    _, head, text = card.split("---\n", 2)
    assert yaml.safe_load(head) == {
        "base_model": "base", "library_name": "transformers", "pipeline_tag": "text-generation",
        "tags": ["elastic_lsopt", "sam"],
    }  # fmt: skip
    for line in (
        "# a", "| data | news.jsonl |", "| method | SAM(rho=0.05", "| training | 96 samples in 3 steps |",
        "| trained parameters | 1,234,567 |", "| held-out loss | 1.2500 nats |", "| seed | 4 |",
        "| 1970-01-01 00:01:00 UTC | 2 | 1 | b died |",
    ):  # fmt: skip
        assert line in text, line
    assert "secret place" not in card and "/home/me" not in card
