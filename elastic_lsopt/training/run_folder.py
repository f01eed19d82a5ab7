"""What a run leaves behind: config.yaml, metrics.jsonl, TensorBoard events, checkpoints, pictures, the exported model."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from elastic_lsopt.config.load import dump_config
from elastic_lsopt.config.settings import TrainConfig
from elastic_lsopt.errors import UserError


class RunFolder:
    """The folder of one run, written by rank 0 alone.

    `metrics.jsonl` holds an object a step (generation, step, samples, loss, lr, batch, world, seconds, …); where a
    step stands twice, because a run was resumed, the last counts. Raises UserError where the folder cannot be written.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.path = Path(config.output_dir)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            (self.path / "config.yaml").write_text(dump_config(config), encoding="utf-8")
            self._metrics = (self.path / "metrics.jsonl").open("a", encoding="utf-8")
        except OSError as error:
            raise UserError(
                f"output_dir={config.output_dir!r} cannot be written: {error.strerror}; choose another."
            ) from error
        self._board: Any = None
        if "tensorboard" in config.report_to:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(self.path / "tensorboard"))

    def write(self, step: dict[str, Any]) -> None:
        """One step's object. A full disk costs lines of metrics, never the training."""
        try:
            self._metrics.write(json.dumps(step) + "\n")
            self._metrics.flush()
        except OSError:
            return
        if self._board is not None:
            for key, value in step.items():
                if isinstance(value, int | float) and key not in ("step", "generation"):
                    self._board.add_scalar(key, value, step["step"])

    def close(self) -> None:
        try:
            self._metrics.flush()
            os.fsync(self._metrics.fileno())
            self._metrics.close()
            if self._board is not None:
                self._board.close()
        except OSError:
            pass


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The steps of a metrics.jsonl in order, the last object of each; a line that a crash cut short is passed over."""
    steps: dict[int, dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        steps[row["step"]] = row
    return [steps[s] for s in sorted(steps)]
