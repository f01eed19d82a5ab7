"""Code that a YAML file names runs when its owner says so, and not because somebody looks at the file."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import yaml

from elastic_lsopt.cli.main import main

CODE = """
from pathlib import Path
import torch

Path(__file__).with_name("ran").touch()

class Net(torch.nn.Linear):
    def __init__(self):
        super().__init__(64, 10)

class Asks(Net):
    def __init__(self):
        super().__init__()
        self.scale = self.weight.sum().item()

def net():
    return Net()

instance = Net()
"""
JOB = {
    "task": "classification", "dataset": "digits", "global_batch_size": 8, "per_device_train_batch_size": 8,
    "max_steps": 1,
}  # fmt: skip


@pytest.fixture
def ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Exists once the user's module was imported."""
    (tmp_path / "users_code.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("users_code", None)
    return tmp_path / "ran"


def job(path: Path, what: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(JOB | {"model": {"import": what}, "output_dir": str(path.parent / "run")}))
    return str(path)


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("elastic-lsopt: ") and printed.err.count("\n") == 1, printed
    return printed.err


@pytest.mark.parametrize("what", ["users_code:net", "users_code:Net"])
def test_validate_imports_nothing_unless_it_is_told_to(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, ran: Path, what: str
) -> None:
    path = job(tmp_path / "job.yaml", what)
    assert main(["validate", path]) == 0
    said = capsys.readouterr().out
    assert (
        f"{what} was not imported, so the model's size, and memory, are not known: --trust" in said and not ran.exists()
    )
    assert "A step: 8 samples" in said and "Memory per rank" not in said and said.endswith("is right.\n")

    assert main(["validate", path, "--trust"]) == 0
    said = capsys.readouterr().out
    assert "650 trainable parameters" in said and "Memory per rank" in said and ran.exists()  # 64 * 10 + 10


def test_the_packages_own_models_need_no_trust(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = job(tmp_path / "job.yaml", "elastic_lsopt.training.classifiers:mlp")
    assert main(["validate", path, "model.args={inputs: 64, hidden: 8, classes: 10}"]) == 0
    assert "trainable parameters" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("what", "kind"),
    [("os:system", "builtin_function_or_method"), ("users_code:instance", "Net"), ("pathlib:Path", "type")],
)
def test_an_import_path_names_a_module_class_or_a_function(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, ran: Path, what: str, kind: str
) -> None:
    path = job(tmp_path / "job.yaml", what)
    for command in ("validate", "train"):
        said = refusal(capsys, command, path, "--trust")
        assert f"{path}:" in said and f"{what!r} is a {kind}; it must name a subclass of torch.nn.Module" in said


def test_a_model_that_asks_for_its_values_cannot_be_sized(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, ran: Path
) -> None:
    said = refusal(capsys, "validate", job(tmp_path / "job.yaml", "users_code:Asks"), "--trust")
    assert "users_code:Asks cannot be built without memory, on torch's meta device" in said


@pytest.mark.parametrize("given", ["runs/x", "runs/x/checkpoints/checkpoint-1", "elsewhere/any/checkpoint-1"])
def test_probe_runs_nothing_that_a_run_folder_names(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, ran: Path, given: str
) -> None:
    run = tmp_path / Path(given).parts[0]
    run = run / "x" if "runs" in given else run
    checkpoint = run / ("checkpoints" if "runs" in given else "any") / "checkpoint-1"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text('{"files": {}}')
    settings = job(run / "config.yaml", "users_code:net")
    said = refusal(capsys, "probe", given)
    assert f"{Path(settings).relative_to(tmp_path)} is the settings of a run" in said
    assert "'users_code:net'" in said and "--trust" in said and not ran.exists()
    # told to, it goes on, and finds that the checkpoint is none
    assert "is no intact checkpoint" in refusal(capsys, "probe", given, "--trust") and ran.exists()


def test_a_runs_own_settings_are_not_trained_without_trust(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, ran: Path
) -> None:
    (tmp_path / "runs" / "x" / "checkpoints").mkdir(parents=True)
    settings = job(tmp_path / "runs" / "x" / "config.yaml", "users_code:net")
    assert "is the settings of a run" in refusal(capsys, "train", settings) and not ran.exists()


def test_a_metric_of_a_finished_run_is_code_as_well(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, ran: Path
) -> None:
    path = tmp_path / "run/config.yaml"
    job(path, "elastic_lsopt.training.classifiers:mlp")
    given = yaml.safe_load(path.read_text())
    given["model"]["args"] = {"inputs": 64, "hidden": 8, "classes": 10}
    path.write_text(yaml.safe_dump(given | {"compute_metrics": "users_code:net", "output_dir": str(tmp_path / "run")}))
    assert main(["validate", str(path)]) == 0
    assert "users_code:net was not imported, so its numbers are not known" in capsys.readouterr().out
    (tmp_path / "run/metrics.jsonl").write_text("")
    assert "and compute_metrics is code: 'users_code:net'" in refusal(capsys, "train", str(path))
    assert not ran.exists()
    path.write_text(yaml.safe_dump(given | {"compute_metrics": "users_code:nothing"}))
    assert "compute_metrics 'users_code:nothing' does not load" in refusal(capsys, "validate", str(path), "--trust")
