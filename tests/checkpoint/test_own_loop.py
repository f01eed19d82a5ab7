"""A user's own loop saves and resumes its LandscapeOptimizer with the same Checkpointer: law 4, bit for bit."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import nn

import elastic_lsopt as lso
from elastic_lsopt.checkpoint.checkpointer import Checkpointer


def test_saved_loaded_continued_equals_never_stopped(tmp_path: Path) -> None:
    torch.manual_seed(0)
    start = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    x, y = torch.randn(12, 5), torch.randint(0, 3, (12,))

    def job(model: nn.Module) -> lso.LandscapeOptimizer:
        base = torch.optim.AdamW(model.named_parameters(), lr=1e-2)
        return lso.LandscapeOptimizer(
            base, lso.LPFSGD(parts=1, gamma=0.1, alpha=3.0), samples_per_step=12, total_samples=96
        )

    def steps(model: nn.Module, optimizer: lso.LandscapeOptimizer, number: int) -> None:
        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            return loss

        for _ in range(number):
            optimizer.step(closure)

    undisturbed, stopped, resumed = copy.deepcopy(start), copy.deepcopy(start), copy.deepcopy(start)
    steps(undisturbed, job(undisturbed), 8)
    first, second = job(stopped), job(resumed)
    steps(stopped, first, 3)
    saving, loading = Checkpointer(tmp_path), Checkpointer(tmp_path)
    saving.save(first, 3)
    saving.close()
    found = loading.resume(second)
    assert found is not None and second.clock.steps == 3 and second.clock.samples == 36
    loading.close()
    steps(resumed, second, 5)
    for name, p in undisturbed.named_parameters():
        assert torch.equal(p, dict(resumed.named_parameters())[name]), name
