"""A model that a YAML file names by import path, which is code that runs: who asks for it, and what it must be.

Whoever starts a job means its file. What looks at files that somebody else may have written runs nothing of them unless
it is told to, by `--trust`: `validate`, and whatever reads the settings that a run has left in its folder.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from elastic_lsopt.config.import_paths import import_paths
from elastic_lsopt.config.settings import SettingError, TrainConfig
from elastic_lsopt.errors import UserError

OWN = "elastic_lsopt.training.classifiers"
"""The models that ship with the package run without being asked for."""
RUNS_OWN = ("checkpoints", "metrics.jsonl")
"""What a run leaves beside its settings."""


def foreign_code(config: TrainConfig) -> dict[str, str]:
    """The import paths that the settings name, by key, but for this package's own models."""
    return {key: path for key, path in import_paths(config) if path.partition(":")[0] != OWN}


def of_a_run(file: Path) -> bool:
    """Whether a settings file lies in the folder of a run, which has written it."""
    return any((file.parent / name).exists() for name in RUNS_OWN)


def refuse_untrusted(config: TrainConfig, file: Path, *, trust: bool) -> None:
    """Raise UserError where the settings that a run has left in `file` name code, unless `trust`."""
    for key, path in foreign_code(config).items() if not trust else ():
        raise UserError(
            f"{file} is the settings of a run, and {key} is code: {path!r}. Whoever wrote that folder chose it; look "
            "at it, and give --trust to run it."
        )


def imported(path: str, args: Mapping[str, Any]) -> nn.Module:
    """What the function or module class at "package.module:name" makes of `args`.

    Raises SettingError, one line, for a path that cannot be imported, names anything else, returns no module or does
    not take these arguments, and on the meta device for a model that needs its values while it is built.
    """
    maker = _maker(path)
    try:
        inspect.signature(maker).bind(**args)
    except TypeError as error:
        raise SettingError("model.args", f"model.args do not fit {path}{inspect.signature(maker)}: {error}.") from None
    try:
        model = maker(**args)
    except (NotImplementedError, RuntimeError) as error:
        if torch.empty(0).device.type != "meta":  # the user's own, whose traceback he needs
            raise
        reason = " ".join(str(error).split())[:200]
        raise SettingError(
            "model.import",
            f"{path} cannot be built without memory, on torch's meta device, by which its size is found: {reason}; "
            "leave values out of its constructor, or validate without --trust.",
        ) from None
    if not isinstance(model, nn.Module):
        raise SettingError("model.import", f"{path} returned a {type(model).__name__}; it must return a torch module.")
    return model


def _maker(path: str) -> Callable[..., Any]:
    module_name, _, name = path.partition(":")
    try:
        maker = getattr(import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise SettingError("model.import", f"model.import={path!r} cannot be imported: {error}.") from None
    if not inspect.isfunction(maker) and not (isinstance(maker, type) and issubclass(maker, nn.Module)):
        raise SettingError(
            "model.import",
            f"model.import={path!r} is a {type(maker).__name__}; it must name a subclass of torch.nn.Module, or a "
            "Python function that returns a torch module.",
        )
    return maker
