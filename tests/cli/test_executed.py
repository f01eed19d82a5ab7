"""Each command executed as a user starts it, where the other tests fork what they start (tests/processes/warm.py)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.jobs import command, losses, run, write_job

SHAPE: dict[str, Any] = {"max_steps": 3, "eval_steps": None, "save_steps": None, "export": False, "workers": 1}


@pytest.mark.parametrize(
    ("launcher", "elastic"),
    [
        pytest.param("none", None, marks=pytest.mark.full),
        pytest.param("none", {}, marks=pytest.mark.full),  # mpirun executes agents and workers each day
        pytest.param("torchrun", None, marks=pytest.mark.full),
        ("deepspeed", None),
    ],
)
def test_train(launcher: str, elastic: dict[str, Any] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LSOPT_TESTS_EXEC", "1")
    said = run(command(launcher, write_job(tmp_path / "run.yaml", elastic=elastic, **SHAPE), world=1), tmp_path)
    assert len(losses(tmp_path / "run")) == 3, said
