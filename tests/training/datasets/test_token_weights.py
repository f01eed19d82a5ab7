"""A step's loss is the mean over all trained tokens of its global batch, however it is cut and dealt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from elastic_lsopt.cli.job_file import read_job
from elastic_lsopt.data.order import SampleOrder
from elastic_lsopt.training.building.models import build_model
from elastic_lsopt.training.datasets.samples import build_data
from tests.jobs import LLAMA, WORDS, Run, losses, rows, write_job

CUTS = [(1, 7), (3, 2)]
"""World size, and samples in a micro-batch."""


def completions(path: Path) -> Path:
    """Of 1 to 9 words after a prompt of 1 to 4."""
    records = [
        {"prompt": " ".join(WORDS[: 1 + i % 4]), "completion": " ".join(["", *WORDS[: 1 + i * 5 % 9]])}
        for i in range(40)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.mark.parametrize("packing", [pytest.param("none", marks=pytest.mark.full), "documents"])
def test_a_jobs_loss_is_the_mean_over_trained_tokens(run: Run, folder: Path, packing: str) -> None:
    given: dict[str, Any] = {
        "dataset": str(completions(folder / "completions.jsonl")), "model": LLAMA, "packing": packing, "block_size": 80,
        "max_steps": 3, "warmup_ratio": None, "eval_steps": None, "save_steps": None, "export": False,
    }  # fmt: skip
    jobs = {}
    for world, size in CUTS:
        name = f"tokens-{packing}-{world}"
        jobs[world] = write_job(folder / f"{name}.yaml", **(given | {"per_device_train_batch_size": size}))
        run(world, jobs[world])
    (one, _), (several, _) = CUTS
    found = {world: folder / f"tokens-{packing}-{world}" for world, _ in CUTS}
    assert losses(found[several]) == pytest.approx(losses(found[one]), rel=1e-5)
    held = [rows(found[world])[3]["eval_loss"] for world, _ in CUTS]
    assert held[1] == pytest.approx(held[0], rel=1e-5)

    config = read_job(jobs[one]).config
    data = build_data(config)
    model = build_model(config, vocabulary_size=257)
    total, targets, seen = 0.0, 0, set()
    for i in SampleOrder(len(data.train), config.seed).at(range(7)).tolist():
        row = data.train[i]
        for ids, labels in row if packing == "documents" else [row]:  # each document alone
            with torch.no_grad():
                logits = model(torch.from_numpy(ids)[None]).logits[0]
            of_one = torch.from_numpy(labels)[1:]
            total += float(torch.nn.functional.cross_entropy(logits[:-1], of_one, reduction="sum"))
            seen.add(int((of_one != -100).sum()))
            targets += int((of_one != -100).sum())
    assert len(seen) > 3  # unequal counts
    assert losses(found[one])[0] == pytest.approx(total / targets, rel=1e-5)
