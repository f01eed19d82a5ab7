"""Jobs whose `optim` is an update of ours: the model is exported where it is evaluated, and curvature has what it
needs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import elastic_lsopt as lso
from tests.jobs import Run, in_ranks, losses, write_job

ADAM: dict[str, Any] = {"momentum": None, "learning_rate": 0.01}
ZERO2 = {"backend": "deepspeed", "deepspeed": {"zero_optimization": {"stage": 2}}}


def test_schedule_free_is_exported_at_its_average(run: Run, folder: Path) -> None:
    """x of the last checkpoint, by y + (1 - 1/b) (z - y), which is not y; and the held-out loss is that of x."""
    run(2, write_job(folder / "free.yaml", optim="schedule_free", lr_scheduler_type="constant", **ADAM))
    exported = load_file(folder / "free/model/model.safetensors")
    from tests.cases.elastic.job_models import TinyLM

    torch.manual_seed(0)
    model = TinyLM()
    base = lso.UpdateOptimizer(model.parameters(), "schedule_free", lr=0.01)
    engine = lso.Engine.of(model, base, loss_fn=lambda model, batch: model(batch).sum())
    assert lso.load(engine, folder / "free/checkpoints", hyperparameters=False) is not None
    z: Any = engine.families["update/schedule_free"].state_dict()["z"]
    pairs = zip(engine.space.layout.parameters, engine.space.weights.tensors, z.tensors, strict=True)
    points = {p.name: (y, y + (1 - 1 / 0.9) * (own - y)) for p, y, own in pairs}
    assert all(torch.allclose(exported[n].reshape(-1), x, rtol=0, atol=1e-6) for n, (_, x) in points.items())
    assert any(float((exported[n].reshape(-1) - y).abs().max()) > 1e-4 for n, (y, _) in points.items())


@pytest.mark.parametrize(
    ("optim", "where", "passes"),
    [
        ("sophia_g", ZERO2, [3, 2, 2, 2]),
        pytest.param("sassha", {"backend": "fsdp2"}, [2, 2, 2, 2], marks=pytest.mark.full),
    ],
)
def test_a_language_model_is_looked_at(
    run: Run, folder: Path, optim: str, where: dict[str, Any], passes: list[int]
) -> None:
    """Under SAM: one gradient for drawn labels in the first of ten steps, a product that is no pass."""
    job = write_job(folder / f"{optim}.yaml", optim=optim, **ADAM, **where)
    run(2, job)
    rows = [json.loads(line) for line in (folder / optim / "metrics.jsonl").read_text().splitlines()]
    assert [row["passes"] for row in rows[:4]] == passes
    assert losses(folder / optim)[-1] < losses(folder / optim)[0]


def test_a_classifier_draws_its_labels(ranks: Any, tmp_path: Path) -> None:
    mlp = {"import": "elastic_lsopt.training.classifiers:mlp", "args": {"inputs": 64, "hidden": 8, "classes": 10}}
    job = {
        "task": "classification", "dataset": "digits", "optim": "sophia_g", "max_steps": 2, "block_size": None,
        "model": mlp, "backend": "replicated", "landscape": None, "eval_steps": None, "save_steps": None, **ADAM,
    }  # fmt: skip
    in_ranks(ranks, 1, "job", path=str(write_job(tmp_path / "digits.yaml", **job)))
    assert len(losses(tmp_path / "digits")) == 2
