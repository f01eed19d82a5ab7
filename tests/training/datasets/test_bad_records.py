"""Records that cannot be used: counted, the first ten named by file and line, and a limit that stops the job."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from elastic_lsopt.config.settings import SettingError, TrainConfig
from elastic_lsopt.training.datasets.samples import Data, build_data

pytestmark = pytest.mark.fast


def read(path: Path, limit: int, **given: Any) -> Data:
    fixed = {"output_dir": "out", "max_steps": 1, "model": {"model_type": "llama"}, "block_size": 4}
    return build_data(TrainConfig(dataset=str(path), max_bad_records=limit, **(fixed | {"eval_fraction": 0.0} | given)))


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Thirty records, of which lines 2, 4, … 24 are bad in four ways."""
    good, bad = json.dumps({"text": "good"}), ["{", "[1]", '{"txt": "a"}', '{"text": 1}']
    lines = [bad[i // 2 % 4] if i % 2 == 0 and i <= 24 else good for i in range(1, 31)]
    path = tmp_path / "m.jsonl"
    path.write_text("\n".join(lines))
    return path


def test_up_to_the_limit_they_are_left_out_and_told(mixed: Path) -> None:
    data = read(mixed, 12)
    assert sum(int(t) for i in range(len(data.train)) for t in data.train[i] == ord("g")) == 18
    [note] = data.notes
    assert "without 12 bad records: " in note and note.endswith("(and 2 more)") and "\n" not in note
    assert [f"{mixed}:{n}:" in note for n in range(2, 26, 2)] == [True] * 10 + [False] * 2


def test_one_more_stops_the_job(mixed: Path) -> None:
    with pytest.raises(SettingError, match=r"^12 bad records: .*more than max_bad_records=11; mend the data") as said:
        read(mixed, 11)
    assert "\n" not in str(said.value) and all(f"{mixed}:{n}:" in str(said.value) for n in range(2, 22, 2))
    with pytest.raises(SettingError, match=rf"^{mixed}:2: ") as said:  # the first of all, in its own words
        read(mixed, 0)


def test_what_the_cache_was_made_with_does_not_hide_them(mixed: Path, tmp_path: Path) -> None:
    where = {"dataset_cache_dir": str(tmp_path / "cache")}
    made, found = read(mixed, 12, **where), read(mixed, 20, **where)
    assert made.notes == found.notes
    with pytest.raises(SettingError, match=r"12 bad records: .*more than max_bad_records=3"):
        read(mixed, 3, **where)
    with pytest.raises(SettingError, match=r"12 bad records: .*more than max_bad_records=0"):
        read(mixed, 0, **where)


def test_none_is_good(tmp_path: Path) -> None:
    (tmp_path / "n.jsonl").write_text("{\n{\n")
    with pytest.raises(SettingError, match="holds no text"):
        read(tmp_path / "n.jsonl", 5)
