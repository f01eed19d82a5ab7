"""One checkpoint, now, and back: for a loop that keeps no `Checkpointer`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from elastic_lsopt.checkpoint.checkpointer import Checkpointer, LoadReport
from elastic_lsopt.checkpoint.contents import TrainingState
from elastic_lsopt.errors import UserError


def save(engine: TrainingState, folder: str | Path, *, extra: dict[str, Any] | None = None) -> Path:
    """Write `folder/checkpoint-<step>` of this moment, and wait for it (collective); returns it.

    `engine` is an `lso.Engine` or a `LandscapeOptimizer`, `extra` the caller's own JSON. It can be loaded at any world
    size, on any backend and any ZeRO stage. Raises UserError where it cannot be written.
    """
    checkpoints = Checkpointer(folder)
    try:
        checkpoints.save(engine, engine.clock.steps, extra=extra, asynchronous=False)
        report = checkpoints.wait()
    finally:
        checkpoints.close()
    assert report is not None
    if report.error is not None:
        raise UserError(f"the checkpoint {report.path} could not be written: {report.error}.")
    return report.path


def load(engine: TrainingState, folder: str | Path, *, hyperparameters: bool = True) -> LoadReport | None:
    """Go on from the newest intact checkpoint of a folder, or from one that is given itself (collective).

    `hyperparameters` says whether the param groups' entries (rate, betas …) are taken too. None where there is no
    checkpoint. Raises UserError for a checkpoint of another model.
    """
    path = Path(folder)
    given = path.name.startswith("checkpoint-")
    checkpoints = Checkpointer(path.parent if given else path)
    try:
        return checkpoints.resume(engine, path if given else "auto", hyperparameters=hyperparameters)
    finally:
        checkpoints.close()
