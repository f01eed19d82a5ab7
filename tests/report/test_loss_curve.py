"""loss.png from the rows of a run."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from elastic_lsopt.report.pictures.draw_loss_curve import draw_loss, smoothed

pytestmark = pytest.mark.fast


def rows(steps: int) -> list[dict[str, float | None]]:
    out: list[dict[str, float | None]] = []
    for s in range(1, steps + 1):
        out.append({"step": s, "samples": 32 * s, "loss": 5.0 / s**0.3 + 0.1 * np.sin(s)})
        if s % 50 == 0:
            out[-1]["eval_loss"] = 5.1 / s**0.3
    return out


def test_smoothing_is_a_mean_of_neighbours_on_both_sides() -> None:
    values = [3.0, 1.0, 4.0, 1.0, 5.0, 9.0, 2.0]
    expected = [3.0, *(np.mean(values[i - 1 : i + 2]) for i in range(1, 6)), 2.0]
    assert smoothed(values, share=7) == pytest.approx(expected)
    assert smoothed(values) == pytest.approx(values)


def test_smoothing_does_not_lag() -> None:
    line = [10.0 - 0.01 * i for i in range(900)]
    assert smoothed(line) == pytest.approx(line)


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
