"""A study from the command line: end to end, continued after a kill -9, with the same numbers; and its refusals."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml
from rich.console import Console
from scipy.stats import kendalltau

from elastic_lsopt.cli.main import main
from elastic_lsopt.cli.study import ranking_table
from elastic_lsopt.config.study import StudyConfig
from elastic_lsopt.study.study import ranked
from tests.processes.ranks import rank_environment
from tests.processes.warm import BIN, Popen, run

SETTINGS = {
    "eval_fraction": 0.8, "stop_loss": 0.2, "max_epochs": 100, "bootstrap_draws": 200,
    "measures": ["epsilon_sharpness", "weight_norm"], "workers": 1,
    "grid": {"width": [8, 16], "learning_rate": [0.1, 0.05], "momentum": [0.9]},
}  # fmt: skip


def write(folder: Path, name: str = "study", **changes) -> tuple[Path, Path]:
    out = folder / name
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(SETTINGS | {"output_dir": str(out)} | changes))
    return path, out


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "cells.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, str]:
    """The folder and the output of an undisturbed study."""
    path, out = write(tmp_path_factory.mktemp("study"), workers=2)
    return out, studied(path)


def studied(path: Path) -> str:
    """What the command prints."""
    done = run([str(BIN / "elastic-lsopt"), "study", str(path)], env=rank_environment(), timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_end_to_end(whole):
    out, printed = whole
    study = json.loads((out / "study.json").read_text())
    assert set(study["measures"]) == {"epsilon_sharpness", "weight_norm"}
    assert len(study["models"]) == 4 and study["others"] == []
    for name, told in study["measures"].items():
        gaps, values = ([model[key] for model in study["models"]] for key in ("gap", name))
        assert told["models"] == 4
        assert told["tau"] == pytest.approx(kendalltau(values, gaps).statistic, abs=1e-12)
        assert told["interval"][0] <= told["tau"] <= told["interval"][1]
        assert set(told["granulated"]) == {"width", "learning_rate"}
        assert f"{told['tau']:+.3f}" in printed
    assert {m["width"] for m in study["models"]} == {8, 16}
    rows = [*csv.DictReader((out / "ranking.csv").open())]
    assert [row["measure"] for row in rows] == [*study["measures"]]
    assert float(rows[0]["tau"]) >= float(rows[1]["tau"])
    assert len([*csv.DictReader((out / "models.csv").open())]) == 4
    for picture in ("pictures/ranking.png", "pictures/study.png", "report.html"):
        assert (out / picture).stat().st_size > 5000


@pytest.mark.full  # each day a comparison, which has the same record and pool, is killed (test_compare.py)
def test_killed_and_started_again_it_does_nothing_twice_and_ends_with_the_same_numbers(whole, tmp_path):
    path, out = write(tmp_path)
    command = [str(BIN / "elastic-lsopt"), "study", str(path)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with Popen(command, env=rank_environment(), **quiet) as first:
        until = time.monotonic() + 120
        while not ((out / "cells.jsonl").exists() and len(lines(out)) >= 2):
            assert time.monotonic() < until and first.poll() is None
            time.sleep(0.02)
        first.send_signal(signal.SIGKILL)
    done = lines(out)
    assert 2 <= len(done) < 4
    assert not (out / "study.json").exists()
    studied(path)
    assert lines(out)[: len(done)] == done
    assert len({line["id"] for line in lines(out)}) == len(lines(out)) == 4

    def numbers(folder: Path) -> dict:
        return {k: v for k, v in json.loads((folder / "study.json").read_text()).items() if k != "settings"}

    assert numbers(out) == numbers(whole[0])


@pytest.mark.full
def test_a_study_that_is_done_or_wider_does_only_what_is_new(whole, tmp_path, monkeypatch):
    out = tmp_path / "copy"
    out.mkdir()
    (out / "cells.jsonl").write_bytes((whole[0] / "cells.jsonl").read_bytes())
    path, _ = write(tmp_path, "copy")
    before = lines(out)
    assert main(["study", str(path)]) == 0
    assert lines(out) == before
    assert main(["study", str(path), "grid.width=[8, 16, 24]"]) == 0
    assert lines(out)[:4] == before and len(lines(out)) == 6


def test_failed_networks_are_told_and_tried_again(tmp_path, capfd):
    grid = SETTINGS["grid"] | {"width": [8]}
    # All measures take seconds, so no answer can be there before the limit is seen to have passed.
    path, out = write(tmp_path, timeout_s=1e-3, measures=None, grid=grid)
    assert main(["study", str(path)]) == 1
    assert {line["failure"] for line in lines(out)} == {"it took longer than timeout_s=0.001"}
    assert "2 networks are not ranked" in capfd.readouterr().out
    assert len(json.loads((out / "study.json").read_text())["others"]) == 2
    assert main(["study", str(path), "timeout_s=100", "measures=[weight_norm]"]) == 0
    assert len(json.loads((out / "study.json").read_text())["models"]) == 2


def line(number: int, gap: float, **values: float | None) -> dict:
    settings = dict(
        width=number, depth=1, batch_size=1, learning_rate=0.1, weight_decay=0.0, momentum=0.0, label_noise=0.0, seed=0
    )
    reasons = {name: "the loss is not smooth" for name, value in values.items() if value is None}
    result = {"converged": True, "gap": gap, "loss_gap": -gap, "measures": values, "reasons": reasons}
    return {"id": str(number), "settings": settings, "failure": None, "seconds": 1.0, "result": result}


@pytest.mark.fast
def test_a_measure_that_knows_the_gap_has_tau_one_and_one_that_fails_is_counted():
    gaps = [0.1, 0.4, 0.2, 0.5, 0.3]
    told = [line(i, gap, knows=gap**2, denies=-gap, fails=None) for i, gap in enumerate(gaps)]
    other = line(9, 0.0, knows=5.0) | {"failure": "its process was killed by SIGKILL", "result": None}
    found = ranked([*told, other], ["knows", "denies", "fails"], StudyConfig(output_dir="-"))
    assert found.by_gap["knows"].tau == pytest.approx(1) and found.by_gap["denies"].tau == pytest.approx(-1)
    assert found.by_gap["knows"].interval == pytest.approx((1, 1))
    assert found.by_loss_gap["knows"].tau == pytest.approx(-1)
    assert found.by_gap["fails"].models == 0 and found.missing == {"fails": {"the loss is not smooth": 5}}
    assert [o["reason"] for o in found.others] == ["its process was killed by SIGKILL"]


@pytest.mark.fast
def test_no_number_of_the_ranking_is_cut_where_there_is_no_terminal():
    name = "local_entropy_gradient_normalised"
    told = [line(i, gap, **{name: gap}) for i, gap in enumerate([0.1, 0.4, 0.2, 0.5, 0.3])]
    config = StudyConfig(output_dir="-")
    out = io.StringIO()
    Console(file=out, width=80).print(ranking_table(ranked(told, [name], config), config))
    assert "+1.000 … +1.000" in out.getvalue() and "-1.000" in out.getvalue()
    assert "…" not in out.getvalue().replace(" … ", "")


@pytest.mark.fast
@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("workers=0", "command line, 'workers=0': workers=0 must be greater than or equal to 1."),
        (
            "measures=[surface]",
            "command line, 'measures=[surface]': measure 'surface' is not one number, so nothing can be ranked by it; "
            "remove it.",
        ),
        ("measures=[lpff]", "command line, 'measures=[lpff]': measure 'lpff' is unknown; did you mean 'lpf'?"),
        ("grid.width=[]", "grid.width is empty"),
        ("output_dir=/dev/null/x", "output_dir=/dev/null/x cannot be written: Not a directory; choose another"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, capfd, override, expected):
    path, out = write(tmp_path)
    assert main(["study", str(path), override]) == 2
    told = capfd.readouterr()
    assert told.out == "" and len(told.err.splitlines()) == 1
    assert expected in told.err
    assert not out.exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_a_folder_without_permission(tmp_path, capfd):
    (tmp_path / "closed").mkdir(mode=0o500)
    path, _ = write(tmp_path)
    assert main(["study", str(path), f"output_dir={tmp_path / 'closed' / 'run'}"]) == 2
    assert "cannot be written: Permission denied" in capfd.readouterr().err
