"""What a job measures against its start: the weights that the settings build, also in a run that goes on."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import elastic_lsopt as lso
from elastic_lsopt.cli.job_file import read_job
from elastic_lsopt.report.run import Run
from elastic_lsopt.report.sections import SECTIONS
from elastic_lsopt.report.write import how_to_get
from elastic_lsopt.training.building.models import build_model
from tests import jobs
from tests.jobs import rows, write_job

PROBES = {
    "distance_from_start": {"every_steps": 4, "budget": 1.0},
    "pac_bayes": {"every_steps": 8, "budget": 1.0, "draws": 2, "tolerance": 1e-3},
}


def test_the_distance_is_from_the_start(run: jobs.Run, tmp_path: Path) -> None:
    """By hand from the exported weights; and the same where another world goes on from the middle of the run."""
    job = write_job(tmp_path / "undisturbed.yaml", probes=PROBES)
    run(2, job)
    told = rows(tmp_path / "undisturbed")
    end = load_file(tmp_path / "undisturbed" / "model" / "model.safetensors")
    start = dict(build_model(read_job(job).config).named_parameters())
    by_hand = torch.cat([(end[name].double() - p.detach().double()).flatten() for name, p in start.items()]).norm()
    assert told[8]["probes"]["distance_from_start"]["value"] == pytest.approx(float(by_hand), rel=1e-5)
    assert told[8]["probes"]["pac_bayes"]["square_distance"] == pytest.approx(float(by_hand) ** 2, rel=1e-5)

    shutil.copytree(tmp_path / "undisturbed", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoints" / "checkpoint-8")
    run(3, write_job(tmp_path / "resumed.yaml", probes=PROBES))
    again = rows(tmp_path / "resumed")[8]["probes"]
    assert again["distance_from_start"]["value"] == pytest.approx(float(by_hand), rel=1e-4)
    assert again["pac_bayes"]["value"] == pytest.approx(told[8]["probes"]["pac_bayes"]["value"], rel=1e-2)


@pytest.mark.parametrize(
    "probes,says",
    [
        ({"mode_connectivity": {"every_steps": 1}}, "mode_connectivity needs another model of the same shape: elastic"),
        ({"inverse_mean_valley": {"every_steps": 1}}, "inverse_mean_valley needs several ends of one training, which"),
        ({"mode_conectivity": {"every_steps": 1}}, "unknown measure 'mode_conectivity'"),
    ],
)
def test_a_job_is_not_offered_what_it_cannot_measure(tmp_path: Path, probes: dict[str, object], says: str) -> None:
    with pytest.raises(lso.UserError) as raised:
        read_job(write_job(tmp_path / "job.yaml", probes=probes))
    assert says in str(raised.value) and "\n" not in str(raised.value)
    assert "did you mean 'mode_connectivity'" not in str(raised.value)


def test_the_report_says_how_to_get_what_no_job_measures() -> None:
    [section] = [section for section in SECTIONS if section.key == "mode_connectivity"]
    line = how_to_get(section, Run(name="a", rows=[{"step": 1}]))
    assert line.endswith("elastic-lsopt probe … --measures mode_connectivity --other MODEL")
