"""Where data lies: jsonl, parquet, text, folders of shards, what `datasets` has saved; one record after the other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from elastic_lsopt.config.settings import SettingError, TrainConfig
from elastic_lsopt.training.datasets import records as reading
from elastic_lsopt.training.datasets.bad_records import BadRecords
from elastic_lsopt.training.datasets.records import Record, Source
from elastic_lsopt.training.datasets.samples import build_data

pytestmark = pytest.mark.fast
ROWS = [{"text": f"text {i}", "label": i % 3, "extra": [i]} for i in range(700)]


def records(source: Path, wanted: frozenset[str] | None = None) -> list[Record]:
    return list(Source.of(str(source)).records(BadRecords(0), wanted))


def parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    import pyarrow
    from pyarrow import parquet as files

    files.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=100)
    return path


def jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_parquet_has_the_records_that_were_written(tmp_path: Path) -> None:
    path = parquet(tmp_path / "d.parquet", ROWS)
    found = records(path)
    assert [dict(r.fields) for r in found] == ROWS and len({r.name for r in found}) == 700
    assert found[699].place == f"{path}, row 699"
    some = records(path, frozenset({"text"}))
    assert dict(some[5].fields) == {"text": "text 5"} and list(some[5].known) == ["text", "label", "extra"]


def test_one_data_set_in_every_form_gives_the_same_samples(tmp_path: Path) -> None:
    import datasets

    for name in ("jsonl", "parquet", "both"):
        (tmp_path / name).mkdir()
    for n, (a, b) in enumerate(((0, 300), (300, 700))):
        jsonl(tmp_path / f"jsonl/{n}.jsonl", ROWS[a:b])
        parquet(tmp_path / f"parquet/{n}.parquet", ROWS[a:b])
    jsonl(tmp_path / "both/0.jsonl", ROWS[:300])
    parquet(tmp_path / "both/1.parquet", ROWS[300:])
    jsonl(tmp_path / "one.jsonl", ROWS)
    parquet(tmp_path / "one.parquet", ROWS)
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "table")
    fixed: dict[str, Any] = {
        "output_dir": "out", "max_steps": 1, "model": {"model_type": "bert"}, "eval_fraction": 0.0,
        "task": "sequence_classification", "block_size": 8,
    }  # fmt: skip
    names = ("jsonl", "parquet", "both", "one.jsonl", "one.parquet", "table")
    made = [build_data(TrainConfig(dataset=str(tmp_path / name), **fixed)) for name in names]
    assert len({str(data.identity) for data in made}) == 1 and len(made[0].train) == 700
    ids, label = made[0].train[642]
    assert bytes(ids.tolist()) == b"text 642" and label == 0


def test_a_field_that_is_missing_is_named_beside_those_that_are_there(tmp_path: Path) -> None:
    import datasets

    path = parquet(tmp_path / "d.parquet", [{"txt": "a", "other": 1}])
    datasets.Dataset.from_list([{"txt": "a", "other": 1}]).save_to_disk(tmp_path / "table")
    for source, place in ((path, "d.parquet, row 0"), (tmp_path / "table", "table', row 0")):
        with pytest.raises(SettingError, match=f"{place}: no field 'text' .*did you mean 'txt'") as said:
            build_data(TrainConfig(dataset=str(source), output_dir="out", max_steps=1, model={"model_type": "llama"}))
        assert said.value.key == "dataset_text_field" and "\n" not in str(said.value)


def test_what_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    whole = parquet(tmp_path / "d.parquet", ROWS).read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[:-100])
    (tmp_path / "changed.parquet").write_bytes(whole[:50] + bytes(300) + whole[350:])
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "gone").mkdir()
    (tmp_path / "gone/x.jsonl").symlink_to(tmp_path / "nowhere")
    wrong = [
        (tmp_path / "cut.parquet", "cut.parquet is no parquet file that can be read, from row 0 on"),
        (tmp_path / "changed.parquet", "changed.parquet .*"),
        (tmp_path / "list.json", r"is one JSON text; give .jsonl, a record a line \(jq -c"),
        (tmp_path / "gone", "x.jsonl cannot be read: No such file"),
        (tmp_path / "no.parquet", "does not exist"),
    ]
    for source, message in wrong:
        with pytest.raises(SettingError, match=message) as said:
            records(source)
        assert said.value.key == "dataset" and "\n" not in str(said.value), source


def test_a_large_text_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A document of a folder stays one: its pieces have its name, so they are held out together, and it ends once."""
    monkeypatch.setattr(reading, "PIECE_BYTES", 1000)
    text = "".join(f"line {i}\n" for i in range(700)).encode()
    (tmp_path / "a.txt").write_bytes(text)
    (tmp_path / "b.txt").write_text("b")
    found = records(tmp_path)
    assert [r.name for r in found] == ["a.txt"] * (len(found) - 1) + ["b.txt"] and len(found) > 5
    assert b"".join(r.text or b"" for r in found[:-1]) == text
    assert [r.ends for r in found] == [False] * (len(found) - 2) + [True, True]


def test_a_text_without_lines_is_cut_between_letters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "LONGEST_LINE_BYTES", 100)
    for letters in ("a", "é", "aé€𝄞", "𝄞"):
        text = (letters * 20_000).encode()
        (tmp_path / "t.txt").write_bytes(text)
        pieces = [r.text or b"" for r in records(tmp_path / "t.txt")]
        assert b"".join(pieces) == text and max(map(len, pieces)) <= 16 * 1024 + 104
        assert "".join(piece.decode() for piece in pieces) == text.decode()
