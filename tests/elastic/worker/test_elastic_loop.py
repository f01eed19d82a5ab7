"""A user's own loop: a Python file of about twenty lines, started as `python my_loop.py`."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from elastic_lsopt.elastic.worker.journal import read_journal
from tests.jobs import Started

STEPS, BATCH, UNIT = 60, 8, 2

LOOP = (
    """
import json, sys, time, pathlib
import torch
from torch.distributed.fsdp import fully_shard
import elastic_lsopt as lso
from elastic_lsopt.backends.detect import backend_for

folder = pathlib.Path(sys.argv[1])
rows = [(torch.randn(12, generator=torch.Generator().manual_seed(i)), i % 5) for i in range(96)]
collate = lambda rows: (torch.stack([x for x, _ in rows]), torch.tensor([y for _, y in rows]))
loss = lambda model, batch: torch.nn.functional.cross_entropy(model(batch[0]), batch[1])

def build(world):
    while world.rehearsal and (folder / "hold").exists():
        time.sleep(0.02)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(12, 16), torch.nn.Tanh(), torch.nn.Linear(16, 5))
    fully_shard(model)
    backend = backend_for(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    engine = lso.Engine(backend, lso.SAM(rho=0.05), loss_fn=loss, total_samples=TOTAL)
    return lso.elastic.Job(world=world, engine=engine, dataset=rows, collate=collate, on_step=note)

def note(job, row):
    time.sleep(0.1)
    if job.world.is_first:
        with (folder / "steps.jsonl").open("a") as out:
            print(json.dumps(row), file=out)

reference = lso.elastic.Hyperparameters(global_batch_size=BATCH, learning_rate=0.1, momentum=0.9)
lso.elastic.run(build, {}, reference=reference, microbatch_size=UNIT, output_dir=folder, workers=2)
""".replace("TOTAL", str(STEPS * BATCH))
    .replace("BATCH", str(BATCH))
    .replace("UNIT", str(UNIT))
)


def undisturbed() -> list[float]:
    """SAM over SGD with momentum, from the papers, in a plain loop over the samples in the order of the job."""
    import torch

    from elastic_lsopt.data.order import SampleOrder

    rows = [(torch.randn(12, generator=torch.Generator().manual_seed(i)), i % 5) for i in range(96)]
    order = SampleOrder(96, 0)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(12, 16), torch.nn.Tanh(), torch.nn.Linear(16, 5))
    base, losses = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), []

    def backward(batch: list) -> float:
        base.zero_grad()
        x, y = torch.stack([x for x, _ in batch]), torch.tensor([y for _, y in batch])
        loss = torch.nn.functional.cross_entropy(model(x), y)
        loss.backward()
        return float(loss.detach())

    for step in range(STEPS):
        batch = [rows[i] for i in order.at(range(step * BATCH, (step + 1) * BATCH)).tolist()]
        losses.append(backward(batch))
        with torch.no_grad():
            gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
            length = torch.sqrt(sum((g**2).sum() for g in gradients))  # type: ignore[arg-type]
            moves = [0.05 / length * g for g in gradients]
            for p, move in zip(model.parameters(), moves, strict=True):
                p.add_(move)
        backward(batch)
        with torch.no_grad():
            for p, move in zip(model.parameters(), moves, strict=True):
                p.sub_(move)
        base.step()
    return losses


@pytest.mark.timeout(200)
def test_a_users_own_loop_survives_a_kill(tmp_path: Path) -> None:
    loop, folder = tmp_path / "my_loop.py", tmp_path / "run"
    folder.mkdir()
    loop.write_text(LOOP)
    started = Started([sys.executable, str(loop), str(folder)], tmp_path)
    started.until(lambda: len(_rows(folder)) > 6 and len(read_journal(folder)[-1]["workers"]) == 2)
    rank_0 = read_journal(folder)[-1]["workers"][0]
    victim = next(p for p in started.workers() if f"ELASTIC_LSOPT_WORKER={rank_0}" in _environment(p))
    (folder / "hold").touch()  # nobody comes in its place before the other has gone on alone
    os.kill(victim, signal.SIGKILL)
    started.until(lambda: 1 in {row["world"] for row in _rows(folder)})
    (folder / "hold").unlink()
    assert started.wait() == 0, started.output
    rows = _rows(folder)
    losses = {row["step"]: row["loss"] for row in rows}
    assert [losses[s] for s in range(1, STEPS + 1)] == pytest.approx(undisturbed(), rel=1e-5)
    assert {row["world"] for row in rows} >= {1, 2}
    assert "died: " in started.output, started.output


def _rows(folder: Path) -> list[dict[str, Any]]:
    """Whole lines only."""
    file = folder / "steps.jsonl"
    text = file.read_text() if file.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def _environment(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/environ").read_text().split("\0")
