"""What a new name promises is on disk before it is given, and the name after: a power cut finds the old or the new."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from elastic_lsopt.checkpoint import folder as folders
from elastic_lsopt.checkpoint.huggingface import export_folder

pytestmark = pytest.mark.fast


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """("sync" or "rename", the path it was done to, its last name) in order."""
    seen: list[tuple[str, str]] = []
    sync, rename = os.fsync, os.rename

    def synced(handle: int) -> None:
        seen.append(("sync", Path(os.readlink(f"/proc/self/fd/{handle}")).name))
        sync(handle)

    def renamed(old: Any, new: Any) -> None:
        rename(old, new)
        seen.append(("rename", Path(new).name))

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "rename", renamed)
    return seen


def test_a_checkpoint(tmp_path: Path, done: list[tuple[str, str]]) -> None:
    path = folders.checkpoint_path(tmp_path / "checkpoints", 3)
    staged = folders.staging(path)
    staged.mkdir(parents=True)
    record = folders.write_json(staged / folders.CONTENTS, {})
    folders.commit(path, [record])
    assert done == [
        ("sync", folders.CONTENTS), ("sync", folders.MANIFEST), ("sync", staged.name), ("rename", path.name),
        ("sync", "checkpoints"),
    ]  # fmt: skip


def test_an_export(tmp_path: Path, done: list[tuple[str, str]]) -> None:
    staged = tmp_path / ".staged"
    staged.mkdir()
    (staged / "config.json").write_text("{}")
    export_folder.publish(staged, tmp_path / "model")
    assert done == [
        ("sync", export_folder.EXPORTED), ("sync", ".staged"), ("rename", "model"), ("sync", tmp_path.name),
    ]  # fmt: skip
