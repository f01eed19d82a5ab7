"""Trackers: refused where they are not installed, told the numbers where they are, and never the end of a training."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
from typing import Any

import pytest

from elastic_lsopt.cli.main import main
from elastic_lsopt.config.settings import TrainConfig
from elastic_lsopt.training.reporting.reporters import Reporters
from tests.jobs import write_job

pytestmark = pytest.mark.fast
REST: dict[str, Any] = {"dataset": "x", "model": {"model_type": "llama"}, "max_steps": 1}


@pytest.mark.parametrize("name", ["wandb", "trackio", "mlflow"])
def test_what_is_not_installed_is_refused_at_once(name, tmp_path, capsys):
    if importlib.util.find_spec(name):
        pytest.skip(f"{name} is here")
    job = write_job(tmp_path / "run.yaml", report_to=["tensorboard", name])
    assert main(["train", str(job)]) == 2
    said = capsys.readouterr().err
    assert f"report_to: {name} is not installed; pip install {name}, or leave it out." in said
    assert f"{job}:" in said and not (tmp_path / "run").exists()


def test_an_elastic_job_refuses_trackers():
    with pytest.raises(ValueError, match="report_to: mlflow is not supported in an elastic job"):
        TrainConfig(**REST, output_dir="x", report_to=["mlflow"], elastic={})
    TrainConfig(**REST, output_dir="x", report_to=["tensorboard"], elastic={})


def test_a_tracker_that_breaks_is_let_go_of(caplog):
    class Broken:
        told = 0

        def on_log(self, *_: Any, **__: Any) -> None:
            Broken.told += 1
            raise ConnectionError("the service\nis away")

    reporters = Reporters(TrainConfig(**REST, output_dir="x"))
    reporters._state, reporters._control, reporters._arguments = type("S", (), {})(), None, None
    reporters._callbacks = {"wandb": Broken()}
    logging.getLogger("elastic_lsopt").addHandler(caplog.handler)
    try:
        for step in (1, 2):
            reporters.log({"loss": 1.0}, step)
        reporters.close()
    finally:
        logging.getLogger("elastic_lsopt").removeHandler(caplog.handler)
    assert Broken.told == 1
    assert "report_to: wandb takes no more metrics of this run: the service is away" in caplog.text


def test_mlflow_has_the_losses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri((tmp_path / "mlruns").as_uri())
    reporters = Reporters(TrainConfig(**REST, output_dir=str(tmp_path / "my-run"), report_to=["mlflow"]))
    for step, loss in ((1, 3.0), (2, 2.5)):
        reporters.log({"loss": loss, "probes/trace/value": 7.0}, step)
    mlflow.flush_async_logging()
    reporters.close()
    [run] = mlflow.search_runs(output_format="list")
    assert run.info.run_name == "my-run" and run.info.status == "FINISHED"
    history = mlflow.MlflowClient().get_metric_history(run.info.run_id, "loss")
    assert [(m.step, m.value) for m in history] == [(1, 3.0), (2, 2.5)]
    assert run.data.params["learning_rate"] == "5e-05" and run.data.metrics["probes/trace/value"] == 7.0
