"""A newcomer who copies the blocks of a page into an empty folder, from top to bottom, gets what the page says.

Daily the files are checked one by one (test_every_block.py), and their programs run (test_authors.py).
"""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest

from elastic_lsopt.backends.backend import Backend
from elastic_lsopt.probes.presets import STUDIED
from tests.docs.followed import follow
from tests.jobs import losses, rows
from tests.processes.ranks import ROOT


@pytest.mark.full
def test_a_method_of_ones_own_is_the_papers_and_the_same_on_shards(tmp_path: Path) -> None:
    compared, validated, _, _, _ = follow("docs/own-method.md", tmp_path)
    assert compared.output.startswith("3 passes a step, furthest from the paper: ")
    assert "mine:AscendTwice was not imported" in validated.output
    whole, sharded = losses(tmp_path / "runs/ascend-twice"), losses(tmp_path / "runs/ascend-twice-on-shards")
    assert len(whole) == 4 and whole == pytest.approx(sharded, rel=1e-5)
    assert {row["passes"] for row in rows(tmp_path / "runs/ascend-twice").values()} == {3}


@pytest.mark.full
def test_an_update_and_an_average_of_ones_own(tmp_path: Path) -> None:
    checked, *_ = follow("docs/own-update.md", tmp_path)
    assert checked.output == "lengths of the step: [0.01, 0.01]\n"
    everywhere, matrices = (losses(tmp_path / f"runs/own-update{name}") for name in ("", "-of-matrices"))
    assert everywhere[0] == matrices[0] and everywhere[1:] != matrices[1:]
    assert "the average late" in (tmp_path / "runs/own-update/model/README.md").read_text()


@pytest.mark.full
def test_a_probe_of_ones_own_in_a_job_and_of_a_finished_model(tmp_path: Path) -> None:
    *_, probed = follow("docs/own-probe.md", tmp_path)
    told = rows(tmp_path / "runs/own-probe")
    assert [step for step, row in told.items() if row.get("probes")] == [2, 4]
    assert all(told[step]["probes"]["slope"]["value"] > 0 for step in (2, 4))
    assert re.search(r"mine:slope +0\.\d+", probed.output), probed.output


@pytest.mark.full
def test_zero(tmp_path: Path) -> None:
    *_, status, own = follow("docs/zero3.md", tmp_path)
    first, launched = losses(tmp_path / "runs/zero3"), losses(tmp_path / "runs/launched")
    assert len(first) == 6 and first[:4] == pytest.approx(launched, rel=1e-5)
    assert "6" in status.output and "finished" in status.output
    assert re.match(r"step 20: loss \d\.\d+\n", own.output), own.output


@pytest.mark.full
def test_fsdp2(tmp_path: Path) -> None:
    *_, listed, own = follow("docs/fsdp2.md", tmp_path)
    first, launched = losses(tmp_path / "runs/fsdp2"), losses(tmp_path / "runs/launched")
    assert len(first) == 6 and first[:4] == pytest.approx(launched, rel=1e-6)
    assert "launched" in listed.output
    assert re.match(r"step 20: loss \d\.\d+\n", own.output), own.output


@pytest.mark.full
def test_classification(tmp_path: Path) -> None:
    _, asked, *_ = follow("docs/classification.md", tmp_path)
    assert asked.output == "{0: 'bad', 1: 'good'}\n"
    last = rows(tmp_path / "runs/classifier")[30]
    assert last["eval_accuracy"] == last["eval_macro_f1"] == 1.0
    one, two = (rows(tmp_path / f"runs/{name}")[30] for name in ("measured", "two"))
    assert one["eval_mean_logit"] == pytest.approx(two["eval_mean_logit"], rel=1e-4)


@pytest.mark.full
def test_a_study(tmp_path: Path) -> None:
    first, wider = follow("docs/study.md", tmp_path, lambda block: "studies" not in block.text)
    assert "4/4 networks" in first.output and "6/6 networks" in wider.output
    ranking = [*csv.DictReader((tmp_path / "runs/study/ranking.csv").open())]
    assert {row["measure"] for row in ranking} == {"lpf_normalised", "epsilon_sharpness", "weight_norm"}
    assert (tmp_path / "runs/study/report.html").exists()


@pytest.mark.full
def test_probes(tmp_path: Path) -> None:
    follow("docs/probes.md", tmp_path)
    told = rows(tmp_path / "runs/probed")
    assert len(told[10]["probes"]["top_eigenvalues"]["eigenvalues"]) == 3 and told[20]["probes"]["trace"]["value"]
    [answer] = (tmp_path / "runs/probed/probes").glob("*/probes.json")
    assert json.loads(answer.read_text())["failed"] == {}


@pytest.mark.full
def test_an_elastic_job(tmp_path: Path) -> None:
    _, status = follow("docs/elastic.md", tmp_path)
    assert "20" in status.output and len(losses(tmp_path / "runs/elastic")) == 20


@pytest.mark.fast
def test_what_a_backend_must_define_stands_on_its_page() -> None:
    page = (ROOT / "docs/own-backend.md").read_text(encoding="utf-8")
    [table] = re.findall(r"\| from \|.*?(?=\n\n)", page, re.DOTALL)
    named = {name for row in table.splitlines()[2:] for name in re.findall(r"`(\w+)`", row.split("|")[2])}
    assert Backend.__abstractmethods__ <= named, Backend.__abstractmethods__ - named
    values = {"layout", "device", "compute_dtype", "module", "rank", "world", "holders", "name", "base", "transport"}
    assert named == Backend.__abstractmethods__ | values


@pytest.mark.fast
def test_the_number_of_a_studys_measures() -> None:
    assert (ROOT / "docs/study.md").read_text(encoding="utf-8").count("21") == 2 and len(STUDIED) == 21
