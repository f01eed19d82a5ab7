"""Whole jobs on the session's ranks, for this folder's tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.jobs import Run, in_ranks, write_job
from tests.processes.ranks import Ranks


@pytest.fixture(scope="session")
def run(ranks: Callable[[int], Ranks]) -> Run:
    """`run(world, job)`: how the job of a YAML file ended, the same on all ranks."""

    def of(world: int, job: Path) -> dict[str, Any]:
        results = in_ranks(ranks, world, "job", path=str(job))
        assert all(r == results[0] for r in results), results
        return results[0]

    return of


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("jobs")


@pytest.fixture(scope="session")
def whole(run: Run, folder: Path) -> Path:
    """The run folder of eight undisturbed steps, FSDP2 on two ranks: shared, so never write to it."""
    assert run(2, write_job(folder / "whole.yaml")) == pytest.approx({"step": 8, "eval_loss": 5.4, "stopped": 0}, abs=1)
    return folder / "whole"
