"""The tiny job that all launchers of this folder start; its losses must be those of one that nobody disturbs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from elastic_lsopt.elastic.worker.journal import read_journal
from tests.jobs import TINY, rows, write_job

STEPS = 60
SHAPE: dict[str, Any] = {"max_steps": STEPS, "eval_steps": None, "save_steps": None, "workers": 1, "export": False}
LIMIT_S = 400.0
ELASTIC = {"lease_s": 4.0, "max_nodes": 4}


class SlowJob:
    """A job whose steps take a while, until it is told to hurry; and what its run folder says."""

    def __init__(self, folder: Path, name: str = "run", **changes: Any) -> None:
        self._hurry = folder / "hurry"
        slow = {"import": TINY, "args": {"pause_s": 0.25, "hurry_file": str(self._hurry)}}
        self.file = write_job(folder / f"{name}.yaml", **(SHAPE | {"model": slow} | changes))
        self.folder = folder / name

    def hurry(self) -> None:
        self._hurry.touch()

    def step(self) -> int:
        """The last one whose loss is known."""
        return max(rows(self.folder), default=0)

    def nodes(self) -> set[str]:
        """Those that train together now, by name."""
        changes = read_journal(self.folder)
        return set(changes[-1]["nodes"]) if changes else set()
