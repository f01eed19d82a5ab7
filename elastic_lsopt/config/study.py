"""A study's settings: a grid of small networks, when to stop training one, and how to rank the measures.

    config, file = read_study("configs/study-digits.yaml", ["workers=4", "grid.seed=[0, 1, 2]"])

The keys of `grid` are lists; every combination of them is one network. `file` gives later errors their line.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass as plain_dataclass
from dataclasses import field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError
from pydantic.dataclasses import dataclass

from elastic_lsopt.config.load import ConfigFile
from elastic_lsopt.config.ranges import (
    BLOCK,
    SETTINGS,
    BelowOne,
    Count,
    CountOrZero,
    Name,
    NotNegative,
    Positive,
    SettingError,
)
from elastic_lsopt.config.spelling import did_you_mean

Counts = Annotated[tuple[Count, ...], Field(min_length=1, strict=False)]
CountsOrZero = Annotated[tuple[CountOrZero, ...], Field(min_length=1, strict=False)]
Rates = Annotated[tuple[Positive, ...], Field(min_length=1, strict=False)]
NotNegatives = Annotated[tuple[NotNegative, ...], Field(min_length=1, strict=False)]
BelowOnes = Annotated[tuple[BelowOne, ...], Field(min_length=1, strict=False)]


@dataclass(frozen=True, kw_only=True, config=BLOCK)
class Grid:
    """The values of each hyper-parameter; the networks are all combinations."""

    width: Counts = (32,)
    """Units of a hidden layer."""
    depth: Counts = (1,)
    """Hidden layers."""
    batch_size: Counts = (32,)
    """Samples in a step."""
    learning_rate: Rates = (0.1,)
    """Constant; > 0."""
    weight_decay: NotNegatives = (0.0,)
    """Added to the gradient, times the weights; >= 0."""
    momentum: BelowOnes = (0.0,)
    """Of SGD, in [0, 1)."""
    label_noise: BelowOnes = (0.0,)
    """Share of the training labels that are replaced by a wrong class, in [0, 1)."""
    seed: CountsOrZero = (0,)
    """Of the first weights and the order of the samples."""


AXES = tuple(f.name for f in fields(Grid))
"""The hyper-parameters, in the order in which they are varied: the last the fastest."""


@dataclass(frozen=True, kw_only=True, config=SETTINGS)
class StudyConfig:
    """One study. Raises pydantic's ValidationError when made in Python; see `read_study`."""

    dataset: Literal["digits"] = "digits"
    """scikit-learn's handwritten digits: 1797 images of 8 x 8 pixels, 10 classes."""
    eval_fraction: Annotated[float, Field(gt=0, lt=1, strict=True)] = 0.5
    """Share of the images that are never trained on: the test set; in (0, 1)."""
    output_dir: Name
    """The study's folder: cells.jsonl (a network a line), study.json, study.csv, the picture."""
    grid: Grid = field(default_factory=Grid)
    """Lists of hyper-parameters."""

    stop_loss: Positive = 0.01
    """Training ends when the mean cross-entropy of the training set is at most this; > 0."""
    max_epochs: Count = 500
    """Passes after which training ends anyway; such a network is recorded, but neither measured nor ranked."""

    measures: Annotated[tuple[Name, ...], Field(min_length=1, strict=False)] | None = None
    """Names of measures; null: all."""
    bootstrap_draws: Count = 1000
    """Times that the networks are drawn anew, with replacement, for the interval of each rank correlation."""
    confidence: Annotated[float, Field(gt=0, lt=1, strict=True)] = 0.95
    """Share of the draws inside the interval, in (0, 1)."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Of the noisy labels, the measures' random vectors and the bootstrap."""

    workers: Count = 2
    """Networks that are trained and measured at a time, each by a process with one thread."""
    timeout_s: Positive = 300.0
    """Seconds after which a network is given up, and recorded as failed."""

    def __post_init__(self) -> None:
        for axis in AXES:
            values = getattr(self.grid, axis)
            if len(set(values)) < len(values):
                raise SettingError(f"grid.{axis}", f"grid.{axis}={[*values]} holds a value twice; keep one.")
        if self.measures is not None and len(set(self.measures)) < len(self.measures):
            raise SettingError("measures", f"measures={[*self.measures]} holds a name twice; keep one.")


KEYS = tuple(f.name for f in fields(StudyConfig))


@plain_dataclass(frozen=True)
class Study:
    """The settings, and the file that knows where each key stands."""

    config: StudyConfig
    file: ConfigFile


def read_study(path: str | Path, overrides: Sequence[str] = ()) -> Study:
    """The settings of a YAML file with `key=value` overrides laid over it.

    Raises UserError, one line with the file, the line and the fix, for whatever is wrong.
    """
    file = ConfigFile.read(path, overrides)
    with file.located():
        _refuse_unknown(file.values)
        try:
            config = StudyConfig(**file.values)
        except ValidationError as error:
            raise _setting_error(error) from None
    return Study(config, file)


def _refuse_unknown(values: dict[str, Any]) -> None:
    for key in values:
        if key not in KEYS:
            raise SettingError(str(key), f"unknown key {str(key)!r}{did_you_mean(str(key), KEYS)}")
    grid = values.get("grid")
    for key in grid if isinstance(grid, dict) else ():
        if key not in AXES:
            raise SettingError(f"grid.{key}", f"unknown key 'grid.{key}'{did_you_mean(str(key), AXES)}")


def _setting_error(error: ValidationError) -> SettingError:
    """The first of pydantic's findings as a line that names the key, the value and what is allowed."""
    first = error.errors()[0]
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, SettingError):
        return cause
    names = [str(name) for name in first["loc"]]
    key = ".".join(names[:2] if names[0] == "grid" else names[:1])
    match first["type"]:
        case "missing":
            return SettingError(key, f"{key} is missing: the folder that the study writes to.")
        case "too_short":
            return SettingError(key, f"{key} is empty; give at least one value, or leave the key out.")
        case "tuple_type":
            return SettingError(key, f"{key}={first['input']!r} must be a list, such as [{first['input']}].")
        case "dataclass_type":
            return SettingError(key, f"{key}={first['input']!r} must be a mapping of hyper-parameters to lists.")
    wish = first["msg"].removeprefix("Input should be ")
    return SettingError(key, f"{key}={first['input']!r} must be {wish}.")
