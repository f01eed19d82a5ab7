"""A mistake of the user's is one line that names the thing, the value and the fix; exit code 2, and nothing is lost."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from elastic_lsopt.cli.main import main
from tests.jobs import LLAMA, TINY, command, losses, rows, run, write_job

ZERO = {"backend": "deepspeed", "deepspeed": {"zero_optimization": {"stage": 2}}}

HALVES = {"backend": "replicated", "landscape": {"method": "sampa", "halves": True}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bad")


# -- before a worker starts --------------------------------------------------------------------------------------------


@pytest.mark.fast
@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"lerning_rate": 0.1}, r":\d+: unknown key 'lerning_rate'; did you mean 'learning_rate'"),
        ({"learning_rate": -1.0}, r":\d+: learning_rate=-1\.0 must be .*0"),
        ({"warmup_ratio": 1.5}, r":\d+: warmup_ratio=1\.5 must be .*1"),
        ({"landscape": {"method": "sam", "rho": -1.0}}, r":\d+: rho=-1\.0 must be .*>= 0"),
        ({"landscape": {"method": "sma"}}, r":\d+: .*'sma'.*'sam'"),
        ({"landscape": {"method": "sam", "roh": 0.1}}, r":\d+: method 'sam' has no field 'roh'; did you mean 'rho'"),
        ({"dataset": "/no/such/text.txt"}, r":\d+: dataset=/no/such/text\.txt does not exist"),
        ({"model": None, "model_name_or_path": "./no-model"}, r":\d+: model_name_or_path=\./no-model does not exist"),
        ({"tokenizer_name_or_path": "/no/words"}, r":\d+: tokenizer_name_or_path=/no/words does not exist"),
        ({"global_batch_size": 1}, r"global_batch_size=1 must be at least per_device_train_batch_size=2"),
        ({"fp16": True}, r":\d+: fp16: loss scaling is refused: use bf16"),
        (ZERO | {"deepspeed": {"elasticity": {"enabled": True}}}, r":\d+: deepspeed: elasticity is refused"),
        (ZERO | {"deepspeed": {"fp16": {"enabled": True}}}, r":\d+: deepspeed: fp16 is refused.* use bf16"),
        (ZERO | {"deepspeed": "/no/such.json"}, r":\d+: the DeepSpeed JSON /no/such\.json does not exist"),
        ({"resume_from_checkpoint": "/no/checkpoint-1"}, r":\d+: resume_from_checkpoint=/no/checkpoint-1 does not ex"),
        (
            HALVES | {"workers": 3},
            r":\d+: landscape\.halves: workers=3 cannot be parted into two halves",
        ),
        (
            HALVES | {"backend": "fsdp2"},
            r":\d+: landscape\.halves needs .* backend=fsdp2 .* backend: replicated",
        ),
        (HALVES | {"elastic": {"max_nodes": 2}}, r":\d+: landscape\.halves: an elastic job may come to an odd number"),
        ({"output_dir": "/dev/null/run"}, r":\d+: output_dir=/dev/null/run: /dev/null is not a folder"),
    ],
)
def test_refused_before_a_worker_starts(
    folder: Path, capfd: pytest.CaptureFixture[str], changes: dict[str, Any], expected: str
) -> None:
    job = write_job(folder / "job.yaml", **changes)
    assert main(["train", str(job)]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("elastic-lsopt: ")
    assert len(err.splitlines()) == 1, err
    assert re.search(expected, err), err
    assert str(job) in err or "DeepSpeed" in err
    assert not (folder / "job").exists()


# -- in the workers ----------------------------------------------------------------------------------------------------


def _one_line(output: str) -> str:
    """The package's own line, which must be the only one; a launcher's own lines may follow."""
    lines = [line for line in output.splitlines() if line.startswith("elastic-lsopt: ")]
    assert len(lines) == 1, output
    assert "rank 0:" not in output, output
    assert "rank 1:" not in output, output
    return lines[0]


@pytest.mark.parametrize("launcher", ["none", "torchrun"])
def test_an_empty_dataset(folder: Path, launcher: str) -> None:
    (folder / "empty").mkdir(exist_ok=True)
    (folder / "empty" / "a.txt").touch()
    job = write_job(folder / f"empty-{launcher}.yaml", dataset=str(folder / "empty"))
    output = run(command(launcher, job), folder, code=2 if launcher == "none" else 1)
    assert re.search(rf"{job}:\d+: dataset='.*/empty' holds no text", _one_line(output))
    if launcher == "none":
        assert len(output.splitlines()) == 1, output


def test_a_folder_that_rank_0_alone_cannot_make(folder: Path) -> None:
    job = write_job(folder / "proc.yaml", output_dir="/proc/elastic")
    output = run(command("none", job), folder, code=2)
    assert _one_line(output).startswith("elastic-lsopt: output_dir=/proc/elastic cannot be written: ")
    assert len(output.splitlines()) == 1, output


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"model": LLAMA | {"max_position_embeddings": 8}},
            r": block_size=16 is beyond the model's max_position_embeddings=8",
        ),
        ({"block_size": 9999}, r":\d+: the held-out part of dataset=.* block_size=9999; lower block_size"),
        (
            {"model": {"import": "tests.cases.elastic.job_models:TinyML"}},
            r":\d+: model\.import=.*TinyML.* cannot be imported",
        ),
        ({"model": {"import": TINY, "args": {"width": 4, "hight": 3}}}, r":\d+: model\.args do not fit .*hight"),
        ({"max_steps": None, "num_train_epochs": 0.001}, r"num_train_epochs=0\.001 of 951 samples is less than one"),
    ],
)
def test_refused_by_the_ranks(ranks: Any, folder: Path, changes: dict[str, Any], expected: str) -> None:
    """As the ranks raise it; that the command line says it once, is tested above."""
    job = write_job(folder / "ranks.yaml", **changes)
    for said in ranks(2).run("tests.cases.elastic.jobs:refused", path=str(job), timeout_s=150):
        assert re.search(expected, said), said
        assert "\n" not in said


@pytest.mark.parametrize("launcher", ["none", "torchrun"])
def test_a_model_that_raises_on_one_rank(folder: Path, launcher: str) -> None:
    model = {"import": TINY, "args": {"fail_rank": 1}}
    job = write_job(folder / f"fails-{launcher}.yaml", model=model)
    output = run(command(launcher, job), folder, code=1)
    assert len(re.findall(r"^rank 1:\nTraceback", output, re.MULTILINE)) == 1, output
    assert len(re.findall(r"^rank 0:\nTraceback", output, re.MULTILINE)) == 1, output
    assert output.count("ArithmeticError: the model of the user is broken") >= 2
    assert "rank 1 raised ArithmeticError" in output
    assert "elastic-lsopt: " not in output


# -- the disk ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def eight(folder: Path, ranks: Any) -> Path:
    """The run folder of a whole job."""
    job = write_job(folder / "eight.yaml")
    ranks(1).run("tests.cases.elastic.jobs:job", path=str(job), timeout_s=150)
    return folder / "eight"


def test_a_truncated_checkpoint(folder: Path, eight: Path) -> None:
    """The run goes on from the one before, says so, and ends where it would have ended."""
    shutil.copytree(eight, folder / "truncated")
    broken = folder / "truncated/checkpoints/checkpoint-8/rank-0.safetensors"
    os.truncate(broken, 1000)
    output = run(command("none", write_job(folder / "truncated.yaml", workers=1)), folder)
    assert re.search(r"^warning: skipped checkpoint-8, which is damaged: .* has 1000 bytes", output, re.MULTILINE)
    assert re.search(r"^resumed from .*/checkpoint-4, after step 4$", output, re.MULTILINE)
    assert losses(folder / "truncated") == pytest.approx(losses(eight), rel=1e-6)
    ours, whole = ((d / "model/model.safetensors").read_bytes() for d in (folder / "truncated", eight))
    assert ours == whole


@pytest.mark.parametrize("export", [True, False], ids=["exported", "nowhere"])
def test_a_full_disk(folder: Path, eight: Path, export: bool) -> None:
    """A file system of its own for the checkpoints, with room for one and a half: training goes on to the end. Where
    the model is exported that is the job's result; where it is not the job has failed, and goes on when there is room.
    """
    name = f"full-{export}"
    size = sum(f.stat().st_size for f in (eight / "checkpoints/checkpoint-4").iterdir())
    where = folder / name / "checkpoints"
    where.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={int(1.5 * size) // 4096 * 4}k", "none", str(where)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system needs root")
    job = write_job(folder / f"{name}.yaml", workers=1 if export else 2, export=export)
    try:
        output = run(command("none", job), folder, code=0 if export else 2)
        left = sorted(p.name for p in where.iterdir())
        ended = json.loads((folder / name / "state.json").read_text())
        if not export:
            subprocess.run(["mount", "-o", f"remount,size={4 * size // 1024}k", str(where)], check=True)
            assert "resumed from" in run(command("none", job), folder)
            assert sorted(p.name for p in where.iterdir()) == ["checkpoint-4", "checkpoint-8"]
    finally:
        subprocess.run(["umount", str(where)], check=True)
    assert left == ["checkpoint-4"]
    assert len(rows(folder / name)) == 8
    assert losses(folder / name) == pytest.approx(losses(eight), rel=1e-6)
    assert re.search(r"^warning: the save of step 8 failed \(.*No space left on device.*checkpoint-4", output, re.M)
    assert re.search(
        r"the end of this run is in no checkpoint, its save failed \(.*No space.*the last good checkpoint is .*-4[.;]",
        output.splitlines()[-1],
    )
    assert ended["state"] == ("finished" if export else "failed")
    assert "Traceback" not in output
    assert (folder / name / "model/model.safetensors").exists() == export
