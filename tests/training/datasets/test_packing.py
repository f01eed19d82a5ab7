"""How documents become samples: end to end, one each, or several whole ones a sample."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from elastic_lsopt.config.settings import SettingError, TrainConfig
from elastic_lsopt.training.datasets import encoded
from elastic_lsopt.training.datasets.samples import Data, build_data

pytestmark = pytest.mark.fast


def settings(path: Path, **given: Any) -> TrainConfig:
    fixed = {"output_dir": "out", "max_steps": 1, "model": {"model_type": "llama"}, "block_size": 8}
    return TrainConfig(dataset=str(path), **(fixed | {"eval_fraction": 0.0} | given))


def texts(path: Path, *lengths: int) -> Path:
    path.write_text("".join(json.dumps({"text": chr(97 + i) * n}) + "\n" for i, n in enumerate(lengths)))
    return path


def read(row: Any) -> str:
    return "".join(chr(t) if t < 256 else "." for t in row)


def test_one_by_one_a_long_document_is_cut_into_pieces(tmp_path: Path) -> None:
    """Nothing is lost but a last piece of one token, which predicts nothing."""
    data = build_data(settings(texts(tmp_path / "d.jsonl", 3, 17, 8), packing="none"))
    assert [read(data.train[i][0]) for i in range(len(data.train))] == ["aaa.", "b" * 8, "b" * 8, "b.", "c" * 8]
    assert all((ids == labels).all() for ids, labels in map(data.train.__getitem__, range(5)))


def packed(tmp_path: Path, *lengths: int, **given: Any) -> Data:
    return build_data(settings(texts(tmp_path / "d.jsonl", *lengths), packing="documents", **given))


def test_rows_of_whole_documents(tmp_path: Path) -> None:
    """Lengths with their ends 5, 3, 7, 4: rows 7, 5 + 3, 4."""
    data = packed(tmp_path, 4, 2, 6, 3)
    rows = [[read(ids) for ids, _ in data.train[i]] for i in range(len(data.train))]
    assert rows == [["cccccc."], ["aaaa.", "bb."], ["ddd."]]
    batch = data.collate([data.train[i] for i in range(3)])
    assert sorted(batch) == ["input_ids", "labels", "position_ids"]
    assert [read(row) for row in batch["input_ids"].tolist()] == ["cccccc..", "aaaa.bb.", "ddd....."]
    assert batch["position_ids"].tolist() == [[*range(7), 0], [*range(5), *range(3)], [*range(4), *range(4)]]
    labels = [["." if t == 256 else "-" if t == -100 else chr(t) for t in row] for row in batch["labels"].tolist()]
    assert ["".join(row) for row in labels] == ["-ccccc.-", "-aaa.-b.", "-dd.----"]


def test_rows_are_made_of_neighbours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Among so many documents at once, so that the plan of a large corpus needs no memory; each still comes once."""
    monkeypatch.setattr(encoded, "PACKED_AT_ONCE", 4)
    data = packed(tmp_path, *[3] * 10, block_size=9, eval_fraction=0.0)
    rows = ["".join(sorted({read(ids)[0] for ids, _ in data.train[i]})) for i in range(len(data.train))]
    assert rows == ["ab", "cd", "ef", "gh", "ij"]
    held = packed(tmp_path, *[3] * 20, block_size=9, eval_fraction=0.3)
    seen = [{read(ids)[0] for i in range(len(p)) for ids, _ in p[i]} for p in (held.train, held.eval)]
    assert seen[0] | seen[1] == {chr(97 + i) for i in range(20)} and not seen[0] & seen[1] and seen[1]


def test_packed_completions_are_masked_as_they_are_alone(tmp_path: Path) -> None:
    records = [{"prompt": "ab", "completion": "c"}, {"prompt": "d", "completion": "ef"}]
    path = tmp_path / "c.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    data = build_data(settings(path, packing="documents"))
    labels = data.collate([data.train[0]])["labels"]
    assert len(data.train) == 1
    assert labels.tolist() == [[-100, -100, ord("c"), 256, -100, ord("e"), ord("f"), 256]]


def test_the_same_rows_from_memory_and_from_disk(tmp_path: Path) -> None:
    lengths = np.random.default_rng(0).integers(1, 8, 26).tolist()
    kept, cached = (packed(tmp_path, *lengths, dataset_cache_dir=where) for where in (None, str(tmp_path / "cache")))
    assert kept.identity == cached.identity and len(kept.train) == len(cached.train)
    for i in range(len(kept.train)):
        assert [read(a) for a, _ in kept.train[i]] == [read(a) for a, _ in cached.train[i]]


def test_who_cannot_keep_them_apart_is_refused(tmp_path: Path) -> None:
    from elastic_lsopt.training.building.models import build_model

    path = texts(tmp_path / "d.jsonl", 3, 4)
    with pytest.raises(SettingError, match=r"packing=documents: a model of type 'falcon' is not known to keep"):
        build_model(settings(path, packing="documents", model={"model_type": "falcon"}), device="meta")
    with pytest.raises(ValueError, match=r"model\.import names another; use packing: none"):
        settings(path, packing="documents", model={"import": "a:b"})
