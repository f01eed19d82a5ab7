"""A comparison from the command line: end to end, continued after a kill -9, its numbers by hand; and its refusals."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from scipy import stats
from torch import nn
from torch.nn.functional import cross_entropy

from elastic_lsopt.cli.compare import _jobs
from elastic_lsopt.cli.main import main
from elastic_lsopt.config.compare import read_comparison
from elastic_lsopt.study.compare import contenders, task_of
from elastic_lsopt.study.label_noise import wrong_labels
from elastic_lsopt.study.one_run import processes_of, rank_of
from elastic_lsopt.training.classifiers import small_cnn
from tests.processes.ranks import ROOT, rank_environment
from tests.processes.warm import BIN, Popen, run

MLP = {"import": "elastic_lsopt.training.classifiers:mlp", "args": {"inputs": 64, "hidden": 8, "classes": 10}}
SETTINGS: dict[str, Any] = {
    "job": {
        "task": "classification", "dataset": "digits", "eval_fraction": 0.8, "model": MLP, "global_batch_size": 64,
        "per_device_train_batch_size": 64, "max_steps": 6, "optim": "sgd", "momentum": 0.9, "max_grad_norm": 0,
        "lr_scheduler_type": "constant",
    },
    "methods": {
        "sgd": {"learning_rate": 0.1}, "sam": {"landscape": {"method": "sam"}, "grid": {"learning_rate": [1e-4, 0.1]}},
    },
    "seeds": [0, 1], "equal": ["epochs", "gradient_evaluations"], "measures": ["weight_norm"], "units": 2,
}  # fmt: skip


NO_MOMENTUM = {key: value for key, value in SETTINGS["job"].items() if key != "momentum"}


def write(folder: Path, name: str = "compare", **changes: Any) -> tuple[Path, Path]:
    out, path = folder / name, folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(SETTINGS | {"output_dir": str(out)} | changes))
    return path, out


def lines(out: Path) -> list[dict[str, Any]]:
    cells = out / "cells.jsonl"
    text = cells.read_text() if cells.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def test_killed_continued_and_right(tmp_path: Path) -> None:
    held = tmp_path / "held"
    held.touch()
    more = {"held": str(held), "cells": str(tmp_path / "compare/cells.jsonl")}
    model = {"import": "tests.study.pool_tasks:mlp_held_by", "args": MLP["args"] | more}
    path, out = write(tmp_path, job=SETTINGS["job"] | {"model": model})
    command = [str(BIN / "elastic-lsopt"), "compare", str(path)]
    with Popen(command, env=rank_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as first:
        until = time.monotonic() + 120
        while len(lines(out)) < 2:
            assert time.monotonic() < until and first.poll() is None
            time.sleep(0.02)
        first.send_signal(signal.SIGKILL)
    held.unlink()
    done = lines(out)
    assert not (out / "compare.json").exists()
    ended = run(command, env=rank_environment(), timeout=240)
    assert ended.returncode == 0, ended.stderr
    assert lines(out)[: len(done)] == done, "nothing is done twice"
    # sgd takes one gradient a step: what is equal in epochs is equal in gradients, and is run once.
    assert len({line["id"] for line in lines(out)}) == len(lines(out)) == 2 + 2 * (2 + 2)
    rows = {(row["method"], row["equal"]): row for row in json.loads((out / "compare.json").read_text())["rows"]}
    runs = [*csv.DictReader((out / "runs.csv").open())]
    for (method, equal), row in rows.items():
        mine = [r for r in runs if (r["method"], r["equal"], r["of"]) == (method, equal, "seed")]
        assert row["chosen"] == ({"learning_rate": 0.1} if method == "sam" else {}), "the best of its grid"
        losses = [float(r["eval_loss"]) for r in mine]
        low, high = stats.t.interval(0.95, 1, loc=np.mean(losses), scale=stats.sem(losses))
        told = row["numbers"]["eval_loss"]
        assert (told["low"], told["high"], told["n"]) == (pytest.approx(low), pytest.approx(high), 2)
        assert f"{told['mean']:.4g}" in ended.stdout
        steps = 3 if (method, equal) == ("sam", "gradient_evaluations") else 6
        assert row["numbers"]["steps"]["mean"] == steps
        assert row["numbers"]["gradient_evaluations"]["mean"] == steps * (2 if method == "sam" else 1)
        assert row["numbers"]["weight_norm"]["n"] == 2
    assert rows["sgd", "epochs"]["numbers"] == rows["sgd", "gradient_evaluations"]["numbers"]
    assert len([*csv.DictReader((out / "table.csv").open())]) == 4
    assert (out / "pictures/comparison.png").stat().st_size > 5000 and "Methods side by side" in (
        out / "report.html"
    ).read_text()


def test_all_are_judged_by_the_same_samples(tmp_path: Path) -> None:
    """One training in two sizes of micro-batches: what is counted in micro-batches is no other number of samples."""
    job = SETTINGS["job"] | {"eval_batches": 2, "learning_rate": 0.1, "eval_fraction": 0.2}
    job |= {"global_batch_size": 32}  # less than the 64 of a micro-batch that is evaluated
    methods = {"whole": {}, "in parts": {"per_device_train_batch_size": 4}}
    more = {"equal": ["epochs"], "seeds": [0], "measures": ["sam_sharpness"]}
    path, out = write(tmp_path, job=job, methods=methods, **more)
    assert main(["compare", str(path)]) == 0
    whole, parts = (row["numbers"] for row in json.loads((out / "compare.json").read_text())["rows"])
    for name in ("eval_loss", "train_loss", "eval_accuracy", "sam_sharpness"):
        assert parts[name]["mean"] == pytest.approx(whole[name]["mean"], rel=1e-4), name


REPLICAS: dict[str, Any] = {"rule": "local_sgd", "replicas": 2, "pull": 1.0}
PADDED = 1024
"""Of the 610 parameters: numbers travel in multiples of 1024."""


def test_replicas_that_meet_at_every_step_are_one_job(tmp_path: Path) -> None:
    """Plain SGD: the same model as of one process on the same samples; and what two replicas send, by hand."""
    axes = {"tau": {"every step": {}, 1: {"consensus.tau": 1}, 4: {"consensus.tau": 4}}}
    methods = {
        "together": {"at": {"tau": ["every step"]}},
        "apart": {"at": {"tau": [1, 4]}, "consensus": REPLICAS},
        "apart, SAM": {"at": {"tau": [1]}, "consensus": REPLICAS, "landscape": {"method": "sam"}},
    }
    more = {"seeds": [0], "equal": ["gradient_evaluations"], "measures": ["lambda_max"]}
    path, out = write(tmp_path, job=NO_MOMENTUM | {"learning_rate": 0.1}, methods=methods, axes=axes, **more)
    assert main(["compare", str(path)]) == 0
    rows = {(r["method"], r["tau"]): r["numbers"] for r in json.loads((out / "compare.json").read_text())["rows"]}
    one, each = rows["together", "every step"], rows["apart", 1]
    for name in ("eval_loss", "train_loss", "eval_accuracy", "lambda_max"):
        assert each[name]["mean"] == pytest.approx(one[name]["mean"], rel=1e-4), name
    assert {r["samples"]["mean"] for r in rows.values()} == {6 * 64, 3 * 64}, "SAM takes half of the steps"
    assert one.get("sent_bytes") is None
    assert each["gradient_evaluations"]["mean"] == rows["apart, SAM", 1]["gradient_evaluations"]["mean"] == 6
    for tau, exchanges in ((1, 6), (4, 2)):
        sent = rows["apart", tau]["sent_bytes"]["mean"] / exchanges
        assert sent == 2 * 4 * PADDED, "each sends a half of its own, and its half of the sum"
    assert 0 < each["consensus_distance"]["mean"] < rows["apart", 4]["consensus_distance"]["mean"]


@pytest.mark.full
@pytest.mark.timeout(240)
def test_a_run_of_replicas_is_the_job_that_train_runs(tmp_path: Path) -> None:
    keys = SETTINGS["job"] | {"max_steps": 24, "learning_rate": 0.1, "per_device_train_batch_size": 32}
    keys |= {"consensus": {"rule": "easgd", "replicas": 2, "tau": 4}}
    path, out = write(tmp_path, job=keys, methods={"a": {}}, seeds=[3], equal=["epochs"], measures=[])
    assert main(["compare", str(path)]) == 0
    [found] = [line["result"] for line in lines(out)]
    job, folder = tmp_path / "job.yaml", tmp_path / "job"
    own = {"output_dir": str(folder), "seed": 3, "workers": 2, "backend": "replicated", "export": False}
    job.write_text(yaml.safe_dump(keys | own))
    ended = run([str(BIN / "elastic-lsopt"), "train", str(job)], env=rank_environment(), timeout=200)
    assert ended.returncode == 0, ended.stderr
    told = [
        [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]
        for place in (folder, folder / "replica-1")
    ]
    assert found["eval_loss"] == pytest.approx(told[0][-1]["eval_loss"], rel=1e-6)
    exchanges = [row["exchange"] for row in told[0] if "exchange" in row]
    sent = sum(row["exchange"]["sent_bytes"] for rows in told for row in rows if "exchange" in row)
    assert found["sent_bytes"] == pytest.approx(sent * (len(exchanges) + 1) / len(exchanges), rel=1e-3), "the last too"
    assert 0.2 < found["consensus_distance"] / exchanges[-1]["consensus_distance"] < 5


@pytest.mark.full
def test_a_run_that_fails_harms_no_other_and_says_why(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """One that diverges, one whose code raises; a target that one method reaches."""
    methods = {
        "good": {"learning_rate": 0.1}, "far": {"learning_rate": 1e30},
        "raises": {"model": {"import": MLP["import"], "args": {"inputs": 3, "hidden": 8, "classes": 10}}},
    }  # fmt: skip
    job = SETTINGS["job"] | {"eval_steps": 2, "max_steps": 40}
    path, out = write(tmp_path, methods=methods, job=job, seeds=[0], equal=["epochs"], target_loss=2.0)
    assert main(["compare", str(path)]) == 0
    rows = {row["method"]: row for row in json.loads((out / "compare.json").read_text())["rows"]}
    assert rows["good"]["failed"] == 0 and rows["good"]["numbers"]["steps_to_target"]["mean"] in range(2, 40, 2)
    assert rows["good"]["numbers"]["steps"]["mean"] == rows["good"]["numbers"]["steps_to_target"]["mean"]
    assert rows["far"]["failed"] == rows["raises"]["failed"] == 1
    assert "diverged" in rows["far"]["failure"] and "mat1 and mat2" in rows["raises"]["failure"]
    assert "raises, equal=epochs: 1 of 1 runs have no numbers; the first: RuntimeError" in capfd.readouterr().out


GROWS = {"kind": "noise_scale", "max_global_batch_size": 256, "lr_rule": "none"}
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"sedes": [0]}, "unknown key 'sedes'; did you mean 'seeds'?"),
    ({"seeds": [0, 0]}, "seeds=[0, 0] holds a value twice"),
    ({"seeds": [0, 1000]}, "tuning_seed=1000 is one of the seeds"),
    ({"equal": ["hours"]}, "must be 'epochs' or 'gradient_evaluations'"),
    ({"methods": {}}, "methods={} must be"),
    ({"methods": {"a": {"learnig_rate": 1}}}, "unknown key 'learnig_rate'; did you mean 'learning_rate'?"),
    ({"methods": {"a": {"landscape": {"method": "smm"}}}}, "unknown method 'smm'; did you mean 'sam'?"),
    ({"methods": {"a": {"grid": {"learning_rate": 0.1}}}}, "methods.a.grid.learning_rate=0.1 must be a list"),
    ({"methods": {"a": {"scale_learning_rate": "cube"}}}, "must be one of none, linear, sqrt, adascale"),
    ({"methods": {"a": {"seed": 1}}}, "methods.a.seed is set by the comparison"),
    ({"job": SETTINGS["job"] | {"workers": 2}}, "job.workers is set by the comparison"),
    ({"job": SETTINGS["job"] | {"max_steps": 0}}, "max_steps=0 must be an integer >= 1"),
    ({"axes": {"label_noise": [1.5]}}, "1.5 must be a number >= 0 and < 1"),
    ({"axes": {"momentum": 0.9}}, "axes.momentum=0.9 must be a list"),
    ({"target_loss": 0.5}, "needs eval_steps"),
    (
        {"target_loss": 0.5, "job": SETTINGS["job"] | {"eval_steps": 2, "per_device_train_batch_size": 16},
         "methods": {"a": {"consensus": {"rule": "easgd", "replicas": 2}}}},
        "target_loss is looked for while a run trains, and a has replicas",
    ),
    ({"methods": {"a": {"consensus": {"rule": "esgd", "replicas": 2}}}}, "did you mean 'easgd'?"),
    ({"methods": {"a": {"consensus": {"rule": "easgd", "replicas": 3}}}}, "must divide global_batch_size=64"),
    ({"axes": {"learning_rate": [0.1, 1.0]}}, "learning_rate is set by axis learning_rate too; remove it"),
    (
        {"axes": {"momentum": [0.5]}, "methods": {"a": {"grid": {"momentum": [0.5, 0.9]}}}},
        "methods.a.grid.momentum is set by axis momentum too",
    ),
    (
        {"axes": {"landscape.rho": [0.1]}, "methods": {"a": {"landscape": {"method": "sam", "rho": 0.2}}}},
        "methods.a.landscape is set by axis landscape.rho too",
    ),
    ({"axes": {"seed": [1, 2]}}, "axes.seed is set by the comparison"),
    ({"axes": {"place": {"far": {"elastic.policy": "keep_batch"}}}}, "axes.place.far.elastic.policy is set by the"),
    ({"methods": {"a": {"grid": {"backend": ["ddp"]}}}}, "methods.a.grid.backend is set by the comparison"),
    ({"methods": {"a": {"at": {"label_noise": [0.0]}}}}, "methods.a.at.label_noise: there is no such axis"),
    (
        {"axes": {"label_noise": [0.0, 0.2]}, "methods": {"a": {"at": {"label_noise": [0.4]}}}},
        "methods.a.at.label_noise=[0.4] must be a list of the axis's values: 0.0, 0.2",
    ),
    (
        {"methods": {"a": {"learning_rate": 0.1, "scale_learning_rate": "linear"}},
         "job": SETTINGS["job"] | {"per_device_train_batch_size": 32, "batch_schedule": GROWS}},
        "methods.a.scale_learning_rate=linear: where a batch_schedule moves the batch its lr_rule moves the rate",
    ),
    ({"methods": {"a": {"scale_learning_rate": "sqrt"}}}, "scale_learning_rate=sqrt needs the learning_rate"),
    ({"measures": ["lambda_mx"]}, "measure 'lambda_mx' is unknown; did you mean 'lambda_max'?"),
]  # fmt: skip


@pytest.mark.fast
@pytest.mark.parametrize(("changes", "says"), WRONG, ids=[next(iter(c)) + str(i) for i, (c, _) in enumerate(WRONG)])
def test_a_wrong_file_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], says: str
) -> None:
    path, out = write(tmp_path, **changes)
    assert main(["compare", str(path)]) == 2
    said = capsys.readouterr().err
    assert says in said and str(path) in said and len(said.splitlines()) == 1, said
    assert lines(out) == []


@pytest.mark.fast
def test_keys_are_laid_over_each_other(tmp_path: Path) -> None:
    """Axis, then method, then the grid's value; the rate of a rule grows with the batch from the job's own on."""
    axes = {"global_batch_size": [64, 256], "net": {"wide": {"model.args.hidden": 32}}}
    methods = {"a": {"landscape": {"method": "sam"}, "learning_rate": 0.1, "scale_learning_rate": "sqrt"}}
    path, _ = write(tmp_path, axes=axes, methods=methods, job=SETTINGS["job"] | {"per_device_train_batch_size": 128})
    read = read_comparison(path)
    made = [task_of(read.config, one, {"landscape.rho": 0.3}, 5, _jobs(read)) for one in contenders(read.config)]
    jobs = [task.config for task in made if task.equal == "epochs"]
    assert [job.global_batch_size for job in jobs] == [64, 256]
    assert [job.learning_rate for job in jobs] == [pytest.approx(0.1), pytest.approx(0.2)]
    assert [job.per_device_train_batch_size for job in jobs] == [64, 128]
    assert all(job.landscape == {"method": "sam", "rho": 0.3} and job.seed == 5 for job in jobs)
    assert all((job.model or {})["args"]["hidden"] == 32 for job in jobs)
    assert len({task.id for task in made}) == 4
    assert SETTINGS["job"]["model"]["args"]["hidden"] == 8


@pytest.mark.fast
def test_an_axis_reaches_into_a_methods_block_and_a_method_may_stay_out(tmp_path: Path) -> None:
    axes = {"landscape.rho": [0.01, 5.0]}
    methods = {
        "sam": {"landscape": {"method": "sam"}},
        "far": {"landscape": {"method": "sam"}, "at": {"landscape.rho": [5.0]}},
    }
    path, _ = write(tmp_path, axes=axes, methods=methods, equal=["epochs"])
    read = read_comparison(path)
    made = [(one.label, task_of(read.config, one, {}, 5, _jobs(read)).config) for one in contenders(read.config)]
    assert sorted((label, job.landscape["rho"]) for label, job in made) == [("far", 5.0), ("sam", 0.01), ("sam", 5.0)]


@pytest.mark.fast
def test_replicas_share_the_batch(tmp_path: Path) -> None:
    """Micro-batches are no larger than a replica's share, and all runs are judged by the job's own."""
    axes = {"tau": {4: {"consensus.tau": 4}, "every step": {}}}
    path, _ = write(tmp_path, axes=axes, methods={"a": {"consensus": REPLICAS, "at": {"tau": [4]}}}, equal=["epochs"])
    read = read_comparison(path)
    [task] = [task_of(read.config, one, {}, 5, _jobs(read)) for one in contenders(read.config)]
    assert (task.config.per_device_train_batch_size, task.evaluated_by, processes_of(task)) == (32, 64, 2)
    assert task.config.consensus == {**REPLICAS, "tau": 4}


@pytest.mark.fast
def test_the_rates_of_groups_follow_the_batch_too(tmp_path: Path) -> None:
    groups = [{"match": "*.bias", "learning_rate": 0.02}, {"match": "*.0.weight", "weight_decay": 0.1}]
    methods = {"a": {"learning_rate": 0.01, "param_groups": groups, "scale_learning_rate": "linear"}}
    path, _ = write(tmp_path, axes={"global_batch_size": [256]}, methods=methods, equal=["epochs"])
    read = read_comparison(path)
    job = task_of(read.config, contenders(read.config)[0], {}, 5, _jobs(read)).config
    assert job.learning_rate == pytest.approx(0.04)
    assert [group.get("learning_rate") for group in job.param_groups] == [pytest.approx(0.08), None]


@pytest.mark.fast
def test_what_has_no_numbers_is_never_the_best(tmp_path: Path) -> None:
    reached, never = {"steps_to_target": 100, "eval_loss": 0.2}, {"steps_to_target": None, "eval_loss": 0.1}
    diverged = {"steps_to_target": None, "eval_loss": None}
    ranked = sorted([None, diverged, never, reached], key=rank_of)
    assert ranked[:2] == [reached, never] and rank_of(None) == rank_of(diverged)


@pytest.mark.fast
def test_a_look_at_the_curvature_is_no_step_of_one_gradient(tmp_path: Path) -> None:
    methods = {name: {"optim": name, "learning_rate": 0.1} for name in ("sgd", "adamw", "sophia_g", "adahessian")}
    path, _ = write(tmp_path, methods=methods, equal=["gradient_evaluations"], job=NO_MOMENTUM)
    read = read_comparison(path)
    made = {one.label: task_of(read.config, one, {}, 5, _jobs(read)).equal for one in contenders(read.config)}
    curvature = dict.fromkeys(("sophia_g", "adahessian"), "gradient_evaluations")
    assert made == {"sgd": "epochs", "adamw": "epochs"} | curvature


def test_the_training_loss_is_where_the_held_out_loss_is(tmp_path: Path) -> None:
    """An average that has hardly left the first weights: both losses are nearly those of before the training."""
    job = SETTINGS["job"] | {"max_steps": 60, "averages": {"ema": {"decay": 0.9999}}, "evaluate_average": "ema"}
    path, out = write(tmp_path, job=job, methods={"sgd": {"learning_rate": 0.1}}, seeds=[0], equal=["epochs"])
    assert main(["compare", str(path)]) == 0
    [row] = json.loads((out / "compare.json").read_text())["rows"]
    assert row["numbers"]["train_loss"]["mean"] == pytest.approx(row["numbers"]["eval_loss"]["mean"], abs=0.1)
    assert row["numbers"]["train_loss"]["mean"] > 2.0


@pytest.mark.fast
def test_adascale_follows_the_batch_from_the_jobs_own_on(tmp_path: Path) -> None:
    """One step of the job's batch, then the larger one, whose gain is over the job's; the samples are the same."""
    job = {k: v for k, v in SETTINGS["job"].items() if k != "num_train_epochs"} | {"max_steps": 30, "optim": "sgd"}
    methods = {"a": {"learning_rate": 0.1, "scale_learning_rate": "adascale"}}
    path, _ = write(tmp_path, axes={"global_batch_size": [64, 256]}, methods=methods, job=job)
    read = read_comparison(path)
    made = [task_of(read.config, one, {}, 5, _jobs(read)) for one in contenders(read.config)]
    small, large = {task.id: task.config for task in made}.values()
    assert small.batch_schedule is None and (small.global_batch_size, small.max_steps) == (64, 30)
    assert (large.global_batch_size, large.max_steps, large.learning_rate) == (64, 120, 0.1)
    assert large.batch_schedule is not None and large.batch_schedule.lr_rule == "adascale"
    assert large.batch_schedule.steps == ({"at_samples": 1, "global_batch_size": 256},)


@pytest.mark.fast
def test_wrong_labels() -> None:
    labels = np.arange(1000, dtype=np.int64) % 10
    few, many = (wrong_labels(labels, 10, share, 3) for share in (0.2, 0.4))
    assert (few != labels).sum() == 200 and (many != labels).sum() == 400
    assert ((few != labels) <= (many != labels)).all() and set(many.tolist()) == set(range(10))


@pytest.mark.fast
def test_the_small_cnn_learns_an_edge() -> None:
    torch.manual_seed(0)
    model = small_cnn(side=8, channels=4, classes=2)
    x = torch.randn(64, 8, 8)
    y = (x[:, 0].sum(-1) > 0).long()
    base = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(60):
        base.zero_grad()
        cross_entropy(model(x.flatten(1)), y).backward()
        base.step()
    assert (model(x.flatten(1)).argmax(1) == y).float().mean() > 0.95
    assert isinstance(model[1], nn.Conv2d) and sum(p.numel() for p in model.parameters()) == 594


@pytest.mark.fast
@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("compare-*.yaml")), ids=lambda path: path.stem)
def test_the_shipped_files_make_jobs(path: Path) -> None:
    read = read_comparison(path)
    jobs = _jobs(read)
    for one in contenders(read.config):
        for values in read.config.candidates(one.label):
            task_of(read.config, one, values, 0, jobs)
