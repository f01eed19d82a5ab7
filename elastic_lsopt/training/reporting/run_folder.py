"""What a run leaves behind: settings, metrics, TensorBoard events, checkpoints, pictures, the model, its probes."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

import yaml

from elastic_lsopt.config.load import dump_config
from elastic_lsopt.config.settings import TrainConfig
from elastic_lsopt.elastic.worker.journal import JOURNAL
from elastic_lsopt.errors import UserError
from elastic_lsopt.report.run import ANSWERS
from elastic_lsopt.training.reporting.reporters import Reporters
from elastic_lsopt.training.reporting.run_state import STATE, RunState

CONFIG, METRICS, EVENTS, CHECKPOINTS = "config.yaml", "metrics.jsonl", "tensorboard", "checkpoints"
MODEL = "model"
PARTS = (
    CONFIG, METRICS, EVENTS, JOURNAL, STATE, CHECKPOINTS, "loss.png", "members.png", MODEL, "report.html", "pictures",
    ANSWERS,
)  # fmt: skip
"""What a run writes into its folder, and what `elastic-lsopt probe` and `report` add of it."""


class RunFolder:
    """The folder of one run, written by rank 0 alone.

    `metrics.jsonl` holds an object a step (generation, step, samples, loss, lr, batch, world, seconds, …), null for
    what is not finite; where a step stands twice, because a run was resumed, the last counts. What an earlier run has
    left moves to `earlier-1` (2, 3 …) where this one starts `anew`, by `resume_from_checkpoint: none`, so `auto` never
    meets the checkpoints of another run. An earlier run's settings and state stand until this one has `begun`: a
    command that is refused before its first step leaves them true. Raises UserError where the folder cannot be written.
    """

    def __init__(self, config: TrainConfig, *, anew: bool) -> None:
        self.path, self._config = Path(config.output_dir), config
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if anew:
                self._set_earlier_run_aside()
            self.begun = not (self.path / STATE).exists()
            self._metrics = (self.path / METRICS).open("a", encoding="utf-8")
        except OSError as error:
            raise unwritable(config, error) from error
        self.state = RunState(self.path)
        self._to_board, self._board = "tensorboard" in config.report_to, None
        self._reporters = Reporters(config)

    def begin(self) -> None:
        """From here on the folder is this run's: its settings, and what `state` says. Raises as the class does."""
        self.begun = True
        try:
            (self.path / CONFIG).write_text(dump_config(self._config), encoding="utf-8")
        except OSError as error:
            raise unwritable(self._config, error) from error

    def _set_earlier_run_aside(self) -> None:
        earlier = [self.path / name for name in PARTS if (self.path / name).exists()]
        replicas = 1 if self._config.consensus is None else self._config.consensus["replicas"]
        earlier += [  # of those that this run has not; the others set theirs aside
            path for path in self.path.glob("replica-*")
            if (number := path.name.removeprefix("replica-")).isdecimal() and int(number) >= replicas
        ]  # fmt: skip
        if earlier:
            aside = next(p for n in count(1) if not (p := self.path / f"earlier-{n}").exists())
            aside.mkdir()
            for part in earlier:
                part.rename(aside / part.name)

    def write(self, row: dict[str, Any]) -> None:
        """One step's object. A full disk costs metrics, never the training."""
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        with suppress(OSError):
            self._metrics.write(json.dumps(finite) + "\n")
            self._metrics.flush()  # what is here survives a kill
        numbers = {key: value for key, value in _scalars(finite) if key not in ("step", "generation")}
        if self._to_board:
            with suppress(OSError):
                for key, value in numbers.items():
                    self._events(row["step"]).add_scalar(key, value, row["step"])
        self._reporters.log(numbers, row["step"])

    def _events(self, step: int) -> Any:
        """The TensorBoard writer; steps that an earlier life of the run has written from here on are hidden."""
        if self._board is None:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(self.path / EVENTS), purge_step=step)
        return self._board

    def rewound(self) -> None:
        """What follows takes the place of later steps: TensorBoard hides those."""
        if self._board is not None:
            self._board.close()
            self._board = None

    def close(self) -> None:
        """Bring all to the files, and end what trackers are told of this run."""
        self._reporters.close()
        for writer in (self._metrics, self._board):
            if writer is not None:
                with suppress(OSError):
                    writer.close()


def unwritable(config: TrainConfig, error: OSError) -> UserError:
    """What a user is told of a run folder that cannot be used."""
    return UserError(
        f"output_dir={config.output_dir} cannot be written: {error.strerror}; choose another, or make room."
    )


def _scalars(row: dict[str, Any], path: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of a row by their place, `probes/trace/value`; of a list the first eight."""
    for key, given in row.items():
        value = {str(i): v for i, v in enumerate(given[:8])} if isinstance(given, list) else given
        if isinstance(value, dict):
            yield from _scalars(value, f"{path}{key}/")
        elif isinstance(value, int | float):
            yield f"{path}{key}", value


def replica_folders(run: Path) -> dict[int, Path]:
    """The run folders of a job's other replicas, by number; none where its settings name none, or cannot be read."""
    try:
        replicas = yaml.safe_load((run / CONFIG).read_text(encoding="utf-8"))["consensus"]["replicas"]
        folders = {number: run / f"replica-{number}" for number in range(1, replicas)}
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError):
        return {}
    return {number: folder for number, folder in folders.items() if folder.is_dir()}


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The steps of a metrics.jsonl in order; a resumed run replaces what the one before wrote from there on.

    A line that a crash cut short is passed over.
    """
    rows: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        while rows and rows[-1]["step"] >= row["step"]:
            rows.pop()
        rows.append(row)
    return rows
