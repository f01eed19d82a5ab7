"""Where an answer of `elastic-lsopt probe` goes: into the run, a folder each, never over an earlier one."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import elastic_lsopt as lso
from elastic_lsopt.training.probing.answer_folder import answers_folder, claimed, drawn_by

pytestmark = pytest.mark.fast


def a_run(folder: Path) -> Path:
    (folder / "checkpoints" / "checkpoint-4").mkdir(parents=True)
    (folder / "model").mkdir()
    for name in ("config.yaml", "metrics.jsonl", "model/config.json"):
        (folder / name).write_text("")
    return folder


def test_many_at_once_get_a_folder_each(tmp_path: Path) -> None:
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda _: claimed(tmp_path / "probes"), range(64)))
    assert sorted(found) == sorted(tmp_path / "probes" / f"probe-{n}" for n in range(1, 65))


def test_the_newest_has_the_highest_number(tmp_path: Path) -> None:
    """Also where an older one was taken away, and beside folders of other names."""
    for name in ("probe-2", "probe-10", "probe-99-kept", "notes"):
        (tmp_path / name).mkdir()
    assert claimed(tmp_path) == tmp_path / "probe-11"


def test_where_it_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, alone = a_run(tmp_path / "run"), tmp_path / "alone" / "model"
    alone.mkdir(parents=True)
    checkpoint = run / "checkpoints" / "checkpoint-4"
    assert answers_folder(run, checkpoint, None) == run / "probes"
    assert answers_folder(run / "model", None, None) == run / "probes"
    assert answers_folder(alone, None, None) == Path("runs/probe")  # it lies in no run
    assert answers_folder(run, checkpoint, tmp_path / "out") == tmp_path / "out"
    for folder, model, given in (
        (run / "checkpoints", "checkpoint-4", Path("checkpoint-4")), (run / "model", ".", None), (run, "model", None),
    ):  # fmt: skip
        monkeypatch.chdir(folder)
        assert answers_folder(Path(model), given, None).resolve() == run / "probes"
    assert drawn_by(run / "probes" / "probe-1") == run
    assert drawn_by(tmp_path / "out" / "probe-1") == tmp_path / "out" / "probe-1"


def test_a_run_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "probes").write_text("a file is in the way")
    with pytest.raises(lso.UserError) as raised:
        claimed(tmp_path / "probes")
    assert str(raised.value).startswith(f"{tmp_path}/probes cannot be written: ")
    assert str(raised.value).endswith("; name another folder by --output FOLDER.") and "\n" not in str(raised.value)


def test_a_read_only_run_is_one_line() -> None:
    """On a file system that takes no new folder from anybody, root included."""
    with pytest.raises(lso.UserError, match=r"^/proc/self/probes cannot be written: .*--output FOLDER\.$"):
        claimed(Path("/proc/self/probes"))
