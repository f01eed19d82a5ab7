"""Trackers beside metrics.jsonl (wandb, trackio, mlflow), through transformers' own callbacks.

The callbacks expect a Trainer around them; here they get what they read of it: a name, the settings as parameters, the
step. Where they write, and under which project, their own environment variables say (WANDB_PROJECT, WANDB_MODE,
MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME …). TensorBoard is written by the run folder itself, which takes back what a
rewind or a resumed run writes anew; a tracker keeps both.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from elastic_lsopt.config.settings import SettingError, TrainConfig
from elastic_lsopt.errors import UserError

log = logging.getLogger("elastic_lsopt")
CALLBACKS = {"wandb": "WandbCallback", "trackio": "TrackioCallback", "mlflow": "MLflowCallback"}
"""Tracker -> its callback in transformers.integrations; the package to install has the tracker's name."""


def check_reporters(config: TrainConfig) -> None:
    """Raise SettingError, before anything is built, for a reporter that is not installed."""
    for name in config.report_to:
        if importlib.util.find_spec(name) is None:
            raise SettingError("report_to", f"report_to: {name} is not installed; pip install {name}, or leave it out.")


class Reporters:
    """The job's trackers, on the rank that writes. What goes wrong in one later costs its metrics, never the training.

    Raises UserError for one that cannot be imported.
    """

    def __init__(self, config: TrainConfig) -> None:
        named = [name for name in config.report_to if name in CALLBACKS]
        self._callbacks: dict[str, Any] = {}
        if not named:
            return
        from transformers import TrainerControl, TrainerState, integrations

        self._state, self._control = TrainerState(is_world_process_zero=True), TrainerControl()
        self._arguments = _arguments_of(config)
        for name in named:
            try:
                self._callbacks[name] = getattr(integrations, CALLBACKS[name])()
            except Exception as error:  # of whatever its import is made of
                reason = " ".join(str(error).split()) or type(error).__name__
                raise UserError(f"report_to: {name} is installed and cannot be used: {reason}") from None
        self._tell("on_train_begin")

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        """One step's numbers."""
        if self._callbacks:
            self._state.global_step = step
            self._tell("on_log", logs=dict(numbers))

    def close(self) -> None:
        """End the trackers' runs."""
        if self._callbacks:
            self._tell("on_train_end")
            self._callbacks.clear()

    def _tell(self, event: str, **more: Any) -> None:
        for name, callback in list(self._callbacks.items()):
            try:
                getattr(callback, event)(self._arguments, self._state, self._control, model=None, **more)
            except Exception as error:  # a network, a quota, a login: the tracker's own
                del self._callbacks[name]
                log.warning("report_to: %s takes no more metrics of this run: %s", name, " ".join(str(error).split()))


def _arguments_of(config: TrainConfig) -> Any:
    """What the callbacks read of TrainingArguments: a name, a project, and the settings of this job."""
    name = Path(config.output_dir).name
    return SimpleNamespace(
        run_name=name, output_dir=config.output_dir, project="elastic_lsopt", load_best_model_at_end=False,
        trackio_space_id=None, trackio_bucket_id=None, trackio_static_space_id=False, hub_private_repo=None,
        to_dict=lambda: asdict(config),
    )  # fmt: skip
