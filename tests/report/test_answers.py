"""The answers of `elastic-lsopt probe` in the report of their run: beside its own probes, newest first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from elastic_lsopt.cli.main import main
from tests.report.synthetic import OUTLIERS, spectrum, steps, write_run
from tests.report.test_page import HOSTILE, Page, report

DENSITY = "no spectral density in this run"


@pytest.fixture(autouse=True)
def coarse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("elastic_lsopt.report.pictures.style.DPI", 20)


def answer(run: Path, name: str, told: dict[str, Any]) -> None:
    write_run(run / "probes" / name, finished=told)


def told(step: int, **probes: Any) -> dict[str, Any]:
    return {
        "model": f"runs/a/checkpoints/checkpoint-{step}", "step": step, "when": f"2026-01-0{step}T10:00:00+00:00",
        "samples": 64, "loss": 2.5, "probes": probes, "failed": {},
    }  # fmt: skip


def test_each_under_its_own_heading_newest_first(tmp_path: Path) -> None:
    """With when, checkpoint, numbers and pictures; the run's own probes keep their table and their last values."""
    for row in (rows := steps(4, 2, parameters=["a"])):
        row.get("probes", {}).pop("spectral_density", None)
    run = write_run(tmp_path / "run", rows=rows)
    answer(run, "probe-2", told(2, trace={"value": 17.5, "standard_error": 0.25}))
    answer(run, "probe-10", told(4, trace=None, spectral_density=spectrum(OUTLIERS)) | {"failed": {"trace": "why <b>"}})
    (run / "probes" / "probe-11").mkdir()  # no answer yet
    page = report(run)
    headings = ["probe-10 of checkpoint-4", "probe-2 of checkpoint-2"]
    places = [page.text.rindex(text) for text in ("Final values", *headings)]
    assert places == sorted(places)
    assert "2026-01-04T10:00:00+00:00 · runs/a/checkpoints/checkpoint-4 · step 4 · 64 samples" in page.text
    assert "measures: trace, spectral_density" in page.text
    assert "Not measured:trace: why <b>" in page.text
    assert "probe-11" not in page.text
    lines = [line for line in page.cells if line and line[0] == "trace of the Hessian"]
    own, of_answer = lines
    assert own[4] == "at step 4" and own[1].startswith(str(rows[-1]["probes"]["trace"]["value"]))
    assert of_answer[1:3] == ["17.517.5", "0.250.25"] and of_answer[4] == "at step 2"
    assert "answer-2-spectral_density" in {p.stem for p in (run / "pictures").iterdir()}
    assert DENSITY not in page.text  # it is in the answer
    ids = list(page.attributes("id"))
    assert len(ids) == len(set(ids))
    assert all(target[1:] in ids for target in page.attributes("href"))


def test_a_picture_of_an_answer_that_is_gone_goes(tmp_path: Path) -> None:
    run = write_run(
        tmp_path / "run", rows=[{"step": 1, "samples": 8, "loss": 2.0}, {"step": 2, "samples": 16, "loss": 1}]
    )
    answer(run, "probe-1", told(2, spectral_density=spectrum(OUTLIERS)))
    report(run)
    assert (run / "pictures/answer-1-spectral_density.png").is_file()
    (run / "probes/probe-1/probes.json").unlink()
    (run / "pictures/answer-1-mine.png").write_bytes(b"mine")
    (run / "probes").rename(run / "elsewhere")
    written = {p.stem for p in (run / "pictures").iterdir()} if _drawn(run) else set()
    assert written == {"loss", "answer-1-mine"}


def _drawn(run: Path) -> bool:
    return main(["report", str(run)]) == 0


def test_a_run_with_nothing_else(tmp_path: Path) -> None:
    """Its steps were not kept; a measure that gave nothing is still an answer."""
    answer(tmp_path, "probe-1", told(3, trace=None) | {"failed": {"trace": "not finite"}})
    assert _drawn(tmp_path)
    assert "trace: not finite" in Page((tmp_path / "report.html").read_text()).text


@pytest.mark.filterwarnings("ignore:Glyph")
@pytest.mark.parametrize("wrong", [None, [], {}, 3, float("nan"), True, HOSTILE, [HOSTILE], {HOSTILE: HOSTILE}])
def test_fields_of_another_kind_break_nothing(tmp_path: Path, wrong: Any) -> None:
    for field in ("model", "step", "when", "samples", "loss", "failed", "workers"):
        answer(tmp_path, f"probe-{field}", told(1, trace={"value": 1.0}) | {field: wrong})
    assert "script" not in {tag for tag, _ in report(tmp_path).tags}


def test_a_damaged_answer_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer(tmp_path, "probe-1", {"probes": 3})
    assert not _drawn(tmp_path)
    assert f"{tmp_path}/probes/probe-1/probes.json holds no object" in capsys.readouterr().err
