"""report.html and pictures/: one file that needs nothing else, with the run's own numbers, whatever the run holds."""

from __future__ import annotations

import base64
import json
import re
import struct
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from elastic_lsopt.elastic.worker.journal import read_journal
from elastic_lsopt.errors import UserError
from elastic_lsopt.report.run import Run
from elastic_lsopt.report.sections import CAVEAT, SECTIONS
from elastic_lsopt.report.write import write_report
from elastic_lsopt.training.reporting.run_folder import read_metrics
from tests.report.synthetic import CHANGES, OUTLIERS, exchanged, plane, spectrum, steps, study, write_run

OF_A_FOLDER = [section for section in SECTIONS if section.key != "comparison"]
"""A comparison has a folder of its own."""

VOID = {"meta", "img", "br", "hr", "link", "input"}
HOSTILE = '<script>alert("1")</script>&$\\frac{'
WRONG: tuple[Any, ...] = (
    None, float("nan"), float("inf"), "text", [], {}, [None], [[None]], -1, 0, True, 10**400, 1e300, 1e-300,
)  # fmt: skip


class Page(HTMLParser):
    """A document taken apart; refuses tags that do not match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.cells: list[list[str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.cells.append([])
        if tag in ("td", "th"):
            self.cells[-1].append("")
        if tag == "data":
            self.cells[-1][-1] = str(dict(attrs)["value"])

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if {"td", "th"} & set(self.open):
            self.cells[-1][-1] += data

    def attributes(self, name: str) -> Iterator[str]:
        yield from (attrs[name] or "" for _, attrs in self.tags if name in attrs)


def report(folder: Path) -> Page:
    metrics = folder / "metrics.jsonl"
    rows = read_metrics(metrics) if metrics.exists() else []
    written = write_report(folder, Run.of(folder, rows, read_journal(folder)))
    assert written[0] == folder / "report.html"
    assert sorted(written[1:]) == sorted((folder / "pictures").glob("*"))
    assert not list(folder.glob("*.unfinished"))
    return Page(written[0].read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Page]:
    folder = write_run(tmp_path_factory.mktemp("full") / "run", rows=exchanged(steps()), changes=CHANGES, told=study())
    return folder, report(folder)


def test_has_every_section_and_the_caveat_once(full: tuple[Path, Page]) -> None:
    _, page = full
    ids = list(page.attributes("id"))
    assert [i for i in ids if i in {s.key for s in SECTIONS}] == [s.key for s in OF_A_FOLDER]
    assert {"caveat", "values", "tau"} < set(ids)
    assert "missing" not in ids
    assert len(ids) == len(set(ids))
    assert page.text.count(CAVEAT) == 1
    assert "2302.07011" in CAVEAT
    for section in OF_A_FOLDER:
        assert section.meaning in page.text


def test_needs_no_network_script_or_other_file(full: tuple[Path, Page]) -> None:
    folder, page = full
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "embed", "base", "form"}
    assert all(source.startswith("data:image/png;base64,") for source in page.attributes("src"))
    targets = list(page.attributes("href"))
    assert targets
    assert all(target[0] == "#" and target[1:] in list(page.attributes("id")) for target in targets)
    assert not re.search(r"url\(|@import", (folder / "report.html").read_text())
    assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on")]


def test_pictures_are_those_beside_the_page_and_show_something(full: tuple[Path, Page]) -> None:
    folder, page = full
    embedded = [base64.b64decode(source.partition(",")[2]) for source in page.attributes("src")]
    assert len(embedded) == len(OF_A_FOLDER)
    for section, data in zip(OF_A_FOLDER, embedded, strict=True):
        assert data == (folder / "pictures" / f"{section.key}.png").read_bytes()
        width, height = struct.unpack(">II", data[16:24])
        assert width >= 700 and height >= 400, section.key
        assert len(data) > 12_000, section.key
    alts = list(page.attributes("alt"))
    assert all(len(alt) > 8 for alt in alts)


def test_numbers_are_those_of_the_files(full: tuple[Path, Page]) -> None:
    folder, page = full
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["probes"]
    lines = {line[0]: line for line in page.cells if line}
    for i, (value, residual) in enumerate(
        zip(last["top_eigenvalues"]["eigenvalues"], last["top_eigenvalues"]["residuals"], strict=True)
    ):
        assert _starts(lines[f"eigenvalue {i + 1}"][1], value)
        assert _starts(lines[f"eigenvalue {i + 1}"][2], residual)
    for title, name in (("trace of the Hessian", "trace"), ("LPF measure", "lpf"), ("PAC-Bayes", "pac_bayes")):
        line = lines[title]
        assert _starts(line[1], last[name]["value"])
        assert _starts(line[2], last[name]["standard_error"])
        assert line[4:6] == ["at step 400", "30 products"]
        assert _starts(line[6], 1.0)
    assert lines["gradient norm"][2] == "–"
    met = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["exchange"]
    for title, field in (("consensus distance", "consensus_distance"), ("valley width", "valley_width")):
        assert _starts(lines[title][1], met[field]) and lines[title][4] == "at step 400"
    assert _starts(lines["largest Ritz value"][1], max(OUTLIERS))
    assert _starts(lines["edge-of-stability ratio: threshold"][1], last["edge_of_stability"]["threshold"])
    told = json.loads((folder / "study.json").read_text())["measures"]
    for name, expected in told.items():
        assert _starts(lines[name][1], expected["tau"])
        assert _starts(lines[name][2], expected["interval"][0]) and _starts(lines[name][3], expected["interval"][1])
        assert lines[name][4] == "48"


def _starts(cell: str, value: float) -> bool:
    """A cell holds all digits in its attribute, then those that are shown."""
    return cell == f"{value!r}{value:.5g}"


def test_a_finished_model(tmp_path: Path) -> None:
    line = plane() | {"betas": [0.0], "losses": [plane()["losses"][8]], "path": None, "directions": "eigenvectors"}
    probes = {
        "lambda_max": {"eigenvalues": [3.123456789012345], "residuals": [1e-4], "products": 20, "seconds": 1.5},
        "surface": line,
        "spectral_density": spectrum(OUTLIERS),
        "of_a_third_party": {"value": 7.25},
    }
    page = report(write_run(tmp_path / "probed", finished={"model": "runs/a/model", "probes": probes}))
    assert "runs/a/model" in page.text
    assert "3.1235" in page.text
    assert any(line[:1] == ["of a third party"] and line[1] == "7.257.25" for line in page.cells)
    assert {p.stem for p in (tmp_path / "probed/pictures").iterdir()} == {"surface", "spectral_density"}
    assert "no between two models in this run: elastic-lsopt probe … --measures mode_connectivity" in page.text
    assert "add probes:" not in page.text


def test_what_is_missing_is_said_with_the_way_to_it(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "bare", rows=[{k: v for k, v in r.items() if k != "probes"} for r in steps(30, 40)])
    page = report(folder)
    assert "no spectral density in this run: add probes: {spectral_density: …} to its YAML" in page.text
    assert [p.stem for p in (folder / "pictures").iterdir()] == ["loss"]
    assert page.text.count(CAVEAT) == 1


def test_a_picture_that_the_run_has_no_longer_goes(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", rows=steps(10, 20))
    (folder / "pictures").mkdir()
    for name in ("ranking.png", "mine.png"):
        (folder / "pictures" / name).write_bytes(b"old")
    written = write_report(folder, Run.of(folder, read_metrics(folder / "metrics.jsonl"), []))
    assert not (folder / "pictures/ranking.png").exists()
    assert (folder / "pictures/mine.png").read_bytes() == b"old"
    assert folder / "pictures/mine.png" not in written


@pytest.mark.filterwarnings("ignore:Glyph")  # a script that the font lacks is boxes, not an error
def test_hostile_names_are_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("elastic_lsopt.report.pictures.style.DPI", 20)
    rows = steps(40, 20, parameters=[HOSTILE, f"layers.{HOSTILE}.weight", "漢字.weight"])
    for row in rows:
        if "probes" in row:
            row["probes"][HOSTILE] = {"value": 1.0 + row["step"], HOSTILE: 2.0}
            row["probes"]["trajectory"]["alignment"] = {HOSTILE: [0.5, 0.1]}
            row["probes"].get("surface", {})["directions"] = HOSTILE
    told = {"measures": {HOSTILE: {"tau": 0.5, "interval": [0.1, 0.7], "models": 3}}}
    told["models"] = [{"gap": 0.1 * i, HOSTILE: i} for i in range(1, 4)]  # type: ignore[assignment]
    folder = write_run(tmp_path / "<b>&$\\frac{", rows=rows, told=told, finished={"probes": {}, "model": HOSTILE})
    page = report(folder)
    assert "script" not in {tag for tag, _ in page.tags}
    assert HOSTILE in page.text


def _spoiled(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The way to each field of a tree of objects."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield (*path, key)
            if key != "update_to_weight":
                yield from _spoiled(inner, (*path, key))


@pytest.mark.parametrize("turn", [0, *(pytest.param(t, marks=pytest.mark.full) for t in range(5, len(WRONG), 5))])
def test_values_that_are_none_break_nothing(tmp_path: Path, turn: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each field of every probe is null, NaN or of a wrong kind, at the first reading or at the last."""
    monkeypatch.setattr("elastic_lsopt.report.pictures.style.DPI", 20)  # what is drawn counts here, not how fine
    rows = exchanged(steps(4, 2, parameters=["a", "b"]), every=1)
    ways = [*_spoiled(rows[-1]["probes"])]
    assert len(ways) > 80
    for i, way in enumerate(ways):
        row = rows[i % 2 * 2 + 1]["probes"]  # half of them at the first reading, the rest at the last
        for key in way[:-1]:
            row = row.get(key, {}) if isinstance(row, dict) else {}
        if isinstance(row, dict):
            row[way[-1]] = WRONG[(i + turn) % len(WRONG)]
    wrong = WRONG[turn]
    for row in rows[:2]:
        row["lr"] = wrong
        row["loss"] = None
    for i, way in enumerate(_spoiled(rows[-1]["exchange"])):
        if len(way) == 1:
            rows[2 + i % 2]["exchange"][way[0]] = WRONG[(i + turn) % len(WRONG)]
    rows[0]["exchange"] = wrong
    told = study(4)
    told["measures"]["lpf"] = wrong
    told["measures"]["trace"] = {"tau": wrong, "interval": wrong, "models": wrong}
    told["models"][0]["gap"] = wrong
    report(write_run(tmp_path / "run", rows=rows, told=told, finished={"probes": {"lpf": wrong}}))


def test_every_number_null(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("elastic_lsopt.report.pictures.style.DPI", 20)

    def nulls(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: nulls(v) for k, v in value.items()}
        return [nulls(v) for v in value] if isinstance(value, list) else None

    rows = exchanged(steps(4, 2, parameters=["a"]), every=2)
    for row in rows:
        for key in {"probes", "exchange"} & row.keys():
            row[key] = nulls(row[key])
    page = report(write_run(tmp_path / "run", rows=rows))
    assert "nan" not in page.text.lower().split()


@pytest.mark.parametrize(
    ("content", "expected"),
    [("{", "cannot be read"), ("[]", "no object"), ('{"probes": 3}', "'probes'"), ("\xff", "cannot be read")],
)
def test_a_damaged_file_is_named(tmp_path: Path, content: str, expected: str) -> None:
    (tmp_path / "probes.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=rf"probes\.json.*{expected}"):
        Run.of(tmp_path, [], [])


def test_probes_with_names_of_their_own(tmp_path: Path) -> None:
    """A job may take one measure several times, of different parameters: config.yaml says which is which."""
    rows = steps(4, 2, parameters=["a"])
    for row in rows:
        if "probes" in row:
            row["probes"] = {
                "density <of> heads": spectrum(OUTLIERS, seed=1), "first": {"value": 2.0 + row["step"]},
                "top": {"eigenvalues": [5.0, 3.0], "residuals": [0.1, 0.1]},
            }  # fmt: skip
    folder = write_run(tmp_path / "run", rows=rows)
    (folder / "config.yaml").write_text(
        "probes:\n  density <of> heads: {measure: spectral_density, every_steps: 2}\n"
        "  first: {measure: trace, every_steps: 2}\n  top: {measure: lobpcg, every_steps: 2}\n  lpf: {every_steps: 9}\n"
    )
    (folder / "pictures").mkdir()
    (folder / "pictures/surface-1.png").write_bytes(b"of an earlier report")
    page = report(folder)
    pictures = {p.stem for p in (folder / "pictures").iterdir()}
    assert pictures == {"loss", "spectral_density-1", "eigenvalues-1", "measures", "probe_seconds"}
    assert "Spectral density: density <of> heads" in page.text
    assert "no spectral density in this run" not in page.text
    assert "no loss surface in this run" in page.text
    titles = {line[0]: line for line in page.cells if line}
    assert titles["first"][1] == "6.06" and titles["first"][3] == "nats / weight²"
    assert titles["eigenvalue 2 (top)"][1] == "3.03"


@pytest.mark.parametrize("text", ["probes:", "probes: {a: 3, b: {measure: [1]}}", "- 1", "{", "\x00", "a: *b"])
def test_a_config_that_cannot_be_read_renames_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    assert Run.of(tmp_path, [], []).measures == {}


def test_a_step_without_its_samples_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("elastic_lsopt.report.pictures.style.DPI", 20)
    rows = steps(4, 2, parameters=["a"])
    rows[1].pop("samples")
    rows[2]["samples"] = None
    report(write_run(tmp_path / "run", rows=rows, changes=CHANGES))


def test_nothing_to_draw_leaves_nothing_behind(tmp_path: Path) -> None:
    rows = [{"step": 1, "samples": 8, "loss": None}]
    with pytest.raises(UserError, match="holds nothing to draw"):
        write_report(write_run(tmp_path / "run", rows=rows), Run("run", rows))
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["metrics.jsonl"]


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", rows=steps(4, 4))
    (folder / "pictures").write_text("a file is in the way")
    with pytest.raises(UserError, match="cannot be written"):
        write_report(folder, Run("run", steps(4, 4)))
