"""What a classifier has reached on held-out data stands under the picture of its loss."""

from __future__ import annotations

from pathlib import Path

import pytest

from elastic_lsopt.report.run import Run
from elastic_lsopt.report.sections import SECTIONS

pytestmark = pytest.mark.fast


def test_the_last_evaluation_is_told(tmp_path: Path) -> None:
    first = {"step": 1, "samples": 8, "loss": 1.0, "eval_loss": 1.0, "eval_accuracy": 0.1}
    last = {
        "step": 2, "samples": 16, "loss": 0.5, "eval_loss": 0.75, "eval_accuracy": 0.5, "eval_macro_f1": 0.25,
        "eval_broken": None,
    }  # fmt: skip
    [loss] = [section for section in SECTIONS if section.key == "loss"]
    said = loss.draw(Run("run", [first, last, {"step": 3, "samples": 24, "loss": 0.4}]), tmp_path / "loss.png")
    assert said == "Held-out loss 0.7500 nats, accuracy 0.5000, macro f1 0.2500 at the end."
