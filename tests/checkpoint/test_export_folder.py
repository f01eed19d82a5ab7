"""An export replaces what an earlier export has written, by its manifest, and nothing else in the folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from elastic_lsopt.checkpoint.huggingface.export_folder import publish, refusal

pytestmark = pytest.mark.fast


def staged(parent: Path, **files: str) -> Path:
    folder = parent / ".tmp-model"
    folder.mkdir()
    for name, text in files.items():
        path = folder / name.replace("__", "/").replace("_json", ".json")
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return folder


def contents(folder: Path) -> dict[str, str]:
    return {p.relative_to(folder).as_posix(): p.read_text() for p in folder.rglob("*") if p.is_file()}


def test_a_second_export_leaves_what_is_not_its_own(tmp_path: Path) -> None:
    model = tmp_path / "model"
    publish(staged(tmp_path, weights="1", index_json="gone", templates__chat="1"), model)
    (model / "thesis.tex").write_text("mine")
    (model / "notes").mkdir()
    (model / "notes" / "a.txt").write_text("mine too")
    (model / "empty").mkdir()
    (model / "templates" / "own").write_text("beside ours")
    assert refusal(model) is None
    publish(staged(tmp_path, weights="2"), model)
    told = contents(model)
    assert json.loads(told.pop("export_manifest.json"))["files"] == ["weights", "export_manifest.json"]
    assert told == {"weights": "2", "thesis.tex": "mine", "notes/a.txt": "mine too", "templates/own": "beside ours"}
    assert (model / "empty").is_dir()
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_foreign_folder_and_a_foreign_name_are_refused_by_name(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    assert refusal(model) is None
    (model / "model.safetensors").write_text("a download")
    assert refusal(model) == (
        "it holds model.safetensors and no export_manifest.json of an earlier export; give a new folder, or move away "
        "what is there"
    )
    (model / "export_manifest.json").write_text('{"files": ["../escape", "model.safetensors"]}')
    assert refusal(model) is not None
    (model / "export_manifest.json").write_text('{"files": ["export_manifest.json"]}')
    with pytest.raises(FileExistsError, match=r"model/model\.safetensors"):
        publish(staged(tmp_path, **{"model.safetensors": "new"}), model)
    assert (model / "model.safetensors").read_text() == "a download"


@pytest.mark.parametrize("renamed", [False, True])
def test_a_death_in_the_middle_loses_nothing(tmp_path: Path, renamed: bool) -> None:
    model, aside = tmp_path / "model", tmp_path / ".old-model"
    publish(staged(tmp_path, weights="1", index_json="1"), model)
    (model / "thesis.tex").write_text("mine")
    model.rename(aside)
    if renamed:  # the successor has its name, but the old folder was not emptied yet
        model.mkdir()
        (model / "weights").write_text("2")
        (model / "export_manifest.json").write_text('{"files": ["weights", "export_manifest.json"]}')
    publish(staged(tmp_path, weights="3"), model)
    told = contents(model)
    del told["export_manifest.json"]
    assert told == {"weights": "3", "thesis.tex": "mine"}
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
