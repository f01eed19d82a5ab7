"""`elastic-lsopt report`: prints what it wrote; a mistake of the user's is one line and exit code 2."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from elastic_lsopt.cli.main import main
from tests.processes.ranks import ROOT
from tests.report.synthetic import CHANGES, steps, study, write_run


def test_prints_the_paths_that_it_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_run(tmp_path / "run", rows=steps(4, 8), changes=CHANGES)
    with (folder / "metrics.jsonl").open("a") as out:
        out.write('{"step": 5, "sampl')  # a crash cut it short
    assert main(["report", str(folder)]) == 0
    out, err = capsys.readouterr()
    written = [folder / "report.html", folder / "pictures/loss.png", folder / "pictures/members.png"]
    assert out.splitlines() == [str(path) for path in written]
    assert err == ""
    assert all(path.stat().st_size > 10_000 for path in written)


def test_a_study_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_run(tmp_path / "study", told=study(6))
    assert main(["report", str(folder)]) == 0
    assert {Path(line).name for line in capsys.readouterr().out.splitlines()} == {
        "report.html", "ranking.png", "study.png",
    }  # fmt: skip


@pytest.mark.fast
@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (None, "is no folder; give the output_dir"),
        ({}, "is no run folder: it holds none of metrics.jsonl, probes.json, study.json, compare.json"),
        ({"metrics.jsonl": ""}, "holds nothing to draw"),
        ({"metrics.jsonl": '{"loss": 1}\n{"loss": 2}\n'}, r"metrics\.jsonl is damaged \(KeyError: 'step'\)"),
        ({"metrics.jsonl": "3\n"}, r"metrics\.jsonl is damaged"),
        ({"metrics.jsonl": "[3]\n[4]\n"}, r"metrics\.jsonl is damaged"),
        ({"probes.json": "{"}, r"probes\.json cannot be read"),
        ({"study.json": "{}"}, r"study\.json holds no object"),
        ({"study.json": '{"measures": {}}'}, "holds nothing to draw"),
    ],
)
def test_mistakes_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], files: dict[str, str] | None, expected: str
) -> None:
    folder = tmp_path / "run"
    if files is not None:
        folder.mkdir()
        for name, content in files.items():
            (folder / name).write_text(content)
    assert main(["report", str(folder)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"elastic-lsopt: {folder}")
    assert len(err.splitlines()) == 1
    assert re.search(expected, err), err
    assert not (folder / "report.html").exists()


def test_the_package_itself_loads_neither_torch_nor_matplotlib() -> None:
    """Its modules under a bare parent package: `elastic_lsopt` itself imports torch."""
    code = (
        "import sys, types; parent = types.ModuleType('elastic_lsopt'); parent.__path__ = ['elastic_lsopt'];"
        "sys.modules['elastic_lsopt'] = parent; import elastic_lsopt.report.write;"
        "print(sorted({'torch', 'matplotlib', 'pydantic'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
