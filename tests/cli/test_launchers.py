"""The real launchers, started as a user starts them, give the same weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.jobs import LLAMA, command, losses, rows, run, write_job
from tests.processes.ranks import ROOT

BACKENDS: dict[str, dict[str, Any]] = {
    "fsdp2": {},
    "zero2": {"backend": "deepspeed", "deepspeed": {"zero_optimization": {"stage": 2}}},
    "zero3": {"backend": "deepspeed", "deepspeed": {"zero_optimization": {"stage": 3}}},
}
Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Weights]:
    """(backend, launcher) -> the exported weights after six steps of SAM over SGD with momentum on two ranks."""
    folder = tmp_path_factory.mktemp("launchers")

    @cache
    def of(backend: str, launcher: str) -> Weights:
        job = write_job(
            folder / f"{backend}-{launcher}.yaml", model=LLAMA, max_steps=6, eval_steps=None, **BACKENDS[backend]
        )
        run(command(launcher, job), folder)
        assert {row["world"] for row in rows(folder / job.stem).values()} == {2}
        return load_file(folder / job.stem / "model/model.safetensors")

    return of


@pytest.mark.parametrize(
    ("backend", "one", "other"),
    [
        ("fsdp2", "none", "torchrun"),
        ("fsdp2", "none", "deepspeed"),
        pytest.param("zero3", "torchrun", "deepspeed", marks=pytest.mark.full),
    ],
)
def test_the_launcher_changes_no_bit(
    weights: Callable[[str, str], Weights], backend: str, one: str, other: str
) -> None:
    first, second = weights(backend, one), weights(backend, other)
    assert first.keys() == second.keys()
    for name, weight in first.items():
        assert torch.equal(weight, second[name]), name


@pytest.mark.parametrize(("backend", "launcher"), [("zero2", "deepspeed"), ("zero3", "torchrun")])
def test_the_backend_changes_little(weights: Callable[[str, str], Weights], backend: str, launcher: str) -> None:
    """Weights of about 0.02, learning rate 0.1: what parts the sums of FSDP2 and DeepSpeed is rounding."""
    fsdp2 = weights("fsdp2", "none")
    for name, weight in weights(backend, launcher).items():
        assert float((weight - fsdp2[name]).abs().max()) <= 1e-5, name


def test_the_zero3_quickstart_starts(tmp_path: Path) -> None:
    """The file itself, with a smaller model and three steps."""
    run(
        command(
            "deepspeed", ROOT / "configs/quickstart-zero3.yaml", f"output_dir={tmp_path / 'run'}", "max_steps=3",
            "eval_steps=3", "eval_batches=2", "model.hidden_size=24", "model.num_hidden_layers=1",
        ),
        tmp_path,
    )  # fmt: skip
    assert len(losses(tmp_path / "run")) == 3
    assert (tmp_path / "run/model/config.json").exists()
