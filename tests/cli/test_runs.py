"""`elastic-lsopt runs`: what lies in a folder, and where runs differ."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from elastic_lsopt.cli.main import main

pytestmark = pytest.mark.fast


def run_folder(folder: Path, settings: dict[str, Any], losses: list[float | None], state: str = "finished") -> Path:
    """A run as `train` leaves it."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({"output_dir": str(folder)} | settings))
    rows = [
        {"generation": 0, "step": i, "samples": 8 * i, "loss": loss, "lr": 0.1, "batch": 8, "world": 2, "seconds": 0.5}
        for i, loss in enumerate(losses, 1)
    ]
    if rows:
        rows[-1]["eval_loss"] = 1.25
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    told = {"state": state, "step": len(losses), "steps": 10, "time": time.time() - 7200, "why": ""}
    (folder / "state.json").write_text(json.dumps(told))
    return folder


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["runs", *arguments]) == 0
    return capsys.readouterr().out


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["runs", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1
    return printed.err


def test_the_runs_below_a_folder(tmp_path, capsys):
    run_folder(tmp_path / "a", {}, [3.0, 2.5])
    run_folder(tmp_path / "study/b", {}, [3.0, None], "failed")
    run_folder(tmp_path / "a/earlier-1", {}, [9.0])  # of run a's own folder, and no run of this list
    (tmp_path / "empty").mkdir()
    found = {run["name"]: run for run in json.loads(said(capsys, str(tmp_path), "--json"))}
    assert list(found) and set(found) == {"a", "study/b"}
    a, b = found["a"], found["study/b"]
    assert (a["state"], a["step"], a["steps"], a["loss"], a["eval_loss"], a["batch"], a["members"]) == (
        "finished", 2, 10, 2.5, 1.25, 8, 2,
    )  # fmt: skip
    assert b["state"] == "failed" and b["loss"] is None  # its last loss was not finite
    assert a["age_s"] == pytest.approx(7200, abs=60)
    table = said(capsys, str(tmp_path))
    assert "study/b" in table and "2/10" in table and "2 h ago" in table
    assert said(capsys, str(tmp_path / "a")).count("finished") == 1


def test_compared(tmp_path, capsys):
    a = run_folder(tmp_path / "a", {"landscape": {"method": "sam", "rho": 0.05}, "seed": 0}, [3.0, 2.5])
    b = run_folder(tmp_path / "b", {"landscape": {"method": "sam", "rho": 0.1}, "seed": 0, "bf16": True}, [3.0])
    told = json.loads(said(capsys, "compare", str(a), str(b), "--json"))
    assert told["settings"] == {"landscape.rho": [0.05, 0.1], "bf16": [None, True]}
    assert [run["loss"] for run in told["at_end"]] == [2.5, 3.0]
    table = said(capsys, "compare", str(a), str(b))
    assert "landscape.rho" in table and "seed" not in table and "eval_loss" in table
    assert "Their settings are the same." in said(capsys, "compare", str(a), str(a))


def test_mistakes_are_one_line(tmp_path, capsys):
    assert "is no folder" in refusal(capsys, str(tmp_path / "none"))
    assert "holds no run" in refusal(capsys, str(tmp_path))
    assert "runs compare needs two runs" in refusal(capsys, "compare", str(tmp_path))
    assert "is no run folder" in refusal(capsys, "compare", str(tmp_path), str(tmp_path))
    assert "to compare: runs compare a b" in refusal(capsys, "a", "b")
    broken = run_folder(tmp_path / "c", {}, [1.0])
    (broken / "metrics.jsonl").write_text('{"step": 1}\n[1]\n')
    assert "is damaged" in refusal(capsys, str(tmp_path))
    (broken / "config.yaml").write_text("a: [")
    assert "config.yaml cannot be read" in refusal(capsys, "compare", str(broken), str(broken))
