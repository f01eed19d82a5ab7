"""loss.png from the rows of a run."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from elastic_lsopt.report.loss_curve import draw_loss, running_mean

pytestmark = pytest.mark.fast


def rows(steps: int) -> list[dict[str, float | None]]:
    out: list[dict[str, float | None]] = []
    for s in range(1, steps + 1):
        out.append({"step": s, "samples": 32 * s, "loss": 5.0 / s**0.3 + 0.1 * np.sin(s)})
        if s % 50 == 0:
            out[-1]["eval_loss"] = 5.1 / s**0.3
    return out


def test_the_running_mean_is_an_exponential_mean_without_lag() -> None:
    values = [3.0, 1.0, 4.0, 1.0, 5.0]
    weights = 0.9 ** np.arange(5)
    expected = [np.average(values[: n + 1], weights=weights[: n + 1][::-1]) for n in range(5)]
    assert running_mean(values) == pytest.approx(expected)


@pytest.mark.parametrize("steps", [0, 1, 400])
def test_a_picture_for_any_length(tmp_path: Path, steps: int) -> None:
    found = rows(steps)
    if steps == 400:
        found[10]["loss"] = None  # a skipped step
    draw_loss(found, tmp_path / "loss.png", title="SAM over AdamW, text", reference=("byte-bigram entropy", 2.42))
    data = (tmp_path / "loss.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", data[16:24]) == (1050, 630)
    assert len(data) > 10_000
