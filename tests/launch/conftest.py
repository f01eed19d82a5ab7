"""What all launchers' jobs are compared with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.jobs import in_ranks, losses, write_job
from tests.launch.slow_job import SHAPE


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, ranks: Callable[[int], Any]) -> list[float]:
    """The losses of the job on two plain ranks."""
    folder = tmp_path_factory.mktemp("undisturbed")
    in_ranks(ranks, 2, "job", path=str(write_job(folder / "run.yaml", **SHAPE)))
    return losses(folder / "run")
