"""A job that has not left what it was to leave ends with an error, and the same command goes on from there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.jobs import Run, in_ranks, write_job


def test_an_export_that_would_be_refused_is_refused_before_the_first_step(ranks: Any, folder: Path) -> None:
    job = write_job(folder / "early.yaml")
    (folder / "early/model").mkdir(parents=True)
    (folder / "early/model/thesis.tex").touch()
    for said in in_ranks(ranks, 2, "refused", path=str(job)):
        assert said.startswith(f"the export to {folder}/early/model would fail at the end: it holds thesis.tex and no ")
        assert said.endswith("or set export: false.")
    assert sorted(path.name for path in (folder / "early").iterdir()) == ["model"]


def test_an_export_that_fails_is_made_by_the_same_command(ranks: Any, run: Run, folder: Path) -> None:
    job = write_job(folder / "late.yaml", max_steps=2)
    for said in in_ranks(ranks, 2, "spoilt", path=str(job)):
        assert f"the export to {folder}/late/model failed: it holds thesis.tex and no " in said
        assert said.endswith(f"checkpoint is {folder}/late/checkpoints/checkpoint-2; the same command goes on from it.")
    assert json.loads((folder / "late/state.json").read_text())["state"] == "failed"
    (folder / "late/model/thesis.tex").unlink()
    assert run(2, job)["step"] == 2
    assert (folder / "late/model/model.safetensors").exists()
    assert json.loads((folder / "late/state.json").read_text())["state"] == "finished"
