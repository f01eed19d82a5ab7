"""`elastic-lsopt status` of a job of replicas: each of them, and their exchanges that were out of the ordinary."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from elastic_lsopt.cli.main import main

pytestmark = pytest.mark.fast
ENDED = {"state": "finished", "step": 40, "steps": 40, "time": 0.0, "why": ""}


def meeting(number: int, **more: Any) -> dict[str, Any]:
    everybody = {"members": [0, 1, 2], "fit": [0, 1, 2], "missing": [], "well": True, "why": ""}
    return {"event": "exchange", "number": number, "time": 100.0 + number, **everybody, **more}


def written(folder: Path, journals: list[list[dict[str, Any]]]) -> Path:
    """A job of as many replicas as journals."""
    for number, rows in enumerate(journals):
        own = folder / f"replica-{number}" if number else folder
        own.mkdir()
        (own / "state.json").write_text(json.dumps(ENDED))
        (own / "journal.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.yaml").write_text(f"consensus: {{rule: easgd, replicas: {len(journals)}}}\n")
    return folder


def test_each_replica_and_each_exchange_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    without = {"members": [0, 2], "fit": [0, 2], "missing": [1]}
    given = {"fit": [0, 2], "time": 200.0}
    failed = {"well": False, "why": "a replica is gone: [127.0.0.1]:2070", "time": 300.0}
    two = [meeting(3, **without), meeting(4, **given)]
    folder = written(tmp_path / "run", [[two[0], meeting(5, **failed)], [two[1]], two])
    assert main(["status", str(folder)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    for number in (1, 2):
        assert f"replica {number}: finished after step 40 of 40" in said
    assert said.count("exchange 3 of 2 replicas: without replica 1") == 1
    assert said.count("exchange 4 of 3 replicas: the model is given to replica 1") == 1
    assert "exchange 5 of 3 replicas: a replica is gone: [127.0.0.1]:2070; all go on as they were" in said
    assert said.index("exchange 3") < said.index("exchange 4") < said.index("exchange 5")


def test_the_number_of_an_earlier_life_is_another_exchange(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lost = {"members": [0], "fit": [0], "missing": [1]}
    folder = written(tmp_path / "run", [[meeting(3, **lost), meeting(3, **lost, time=5000.0)], []])
    assert main(["status", str(folder)]) == 0
    assert capsys.readouterr().out.count("exchange 3") == 2


def test_lines_that_are_none_break_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = written(tmp_path / "run", [[{"event": "exchange"}, {"event": "exchange", "number": 1}], []])
    with (folder / "journal.jsonl").open("a") as out:
        out.write('[3]\n{"event": "exchange", "num')
    assert main(["status", str(folder)]) == 0
    assert "exchange 1 of 0 replicas" in capsys.readouterr().out
