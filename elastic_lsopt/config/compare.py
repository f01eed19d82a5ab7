"""A comparison's settings: a job, methods that change some of its keys, and what all of them are tried on.

    read = read_comparison("configs/compare-digits.yaml", ["seeds=[0, 1]", "job.num_train_epochs=2"])

`job` holds the keys of a training job. A method and a labelled value of an axis hold keys of the job too, laid over it:
dotted ones into a block (`landscape.rho`), others in place of what is there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass as plain_dataclass
from dataclasses import field, fields
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError
from pydantic.dataclasses import dataclass

from elastic_lsopt.config.load import ConfigFile
from elastic_lsopt.config.ranges import SETTINGS, Count, CountOrZero, Name, Positive, SettingError
from elastic_lsopt.config.spelling import did_you_mean

Equal = Literal["epochs", "gradient_evaluations"]
Keys = dict[str, Any]
NOISE = "label_noise"
"""An axis that is no key of a job: the share of the training labels that are wrong."""
OF_METHOD = ("grid", "scale_learning_rate", "at")
"""Keys of a method that are none of the job."""
RULES = ("none", "linear", "sqrt", "adascale")
OURS = ("output_dir", "seed", "backend", "workers", "elastic", "probes", "deepspeed", "report_to")
"""Keys of a job that a comparison sets itself: a run is one process, or one per replica, on the replicated backend."""
BOTH = ("per_device_train_batch_size",)
"""Keys that axes and methods may set: the method's holds. It says how a batch is cut, not what it is."""


@dataclass(frozen=True, kw_only=True, config=SETTINGS)
class CompareConfig:
    """One comparison. Raises pydantic's ValidationError when made in Python; see `read_comparison`."""

    job: dict[str, Any]
    """The keys of a training job that all runs share: model, dataset, batch, length, schedule."""
    methods: Annotated[dict[str, dict[str, Any]], Field(min_length=1)]
    """By label, keys laid over the job (landscape, optim …); `grid`, lists of values of which the best is taken;
    `scale_learning_rate`, none, linear, sqrt or adascale: with the batch, from the job's own on; and `at`, by axis the
    values at which the method is tried (all)."""
    axes: dict[str, Any] = field(default_factory=dict)
    """What the methods are tried on, all combinations: label_noise or a key of the job with a list of values, or a name
    with labels and the keys that each lays over the job."""
    seeds: Annotated[tuple[CountOrZero, ...], Field(min_length=1, strict=False)] = (0, 1, 2, 3, 4)
    """Of the first weights, the order and the noise: a run for each."""
    tuning_seed: CountOrZero = 1000
    """With which a method's grid is tried; its best values, at each point of the axes, are those of all seeds."""
    equal: Annotated[tuple[Equal, ...], Field(min_length=1, strict=False)] = ("epochs",)
    """What runs have in common: the job's epochs or steps, or as many gradients of a batch as the job has steps."""
    target_loss: Positive | None = None
    """A held-out loss at which a run ends: steps and samples to it are compared. Needs eval_steps in the job."""
    measures: Annotated[tuple[Name, ...], Field(strict=False)] = ()
    """Measures of flatness that are taken at the end of a run."""
    units: Count = 4
    """Micro-batches of training samples that a measure sees, of the size that `job` says for all methods."""
    output_dir: Name
    """The comparison's folder: cells.jsonl (a run a line), compare.json, runs.csv, table.csv, the picture."""
    confidence: Annotated[float, Field(gt=0, lt=1, strict=True)] = 0.95
    """Of the intervals, in (0, 1)."""
    workers: Count = 2
    """Runs at a time, each a process with one thread, or one per replica."""
    timeout_s: Positive = 600.0
    """Seconds after which a run is given up, and recorded as failed."""

    def __post_init__(self) -> None:
        for key in ("seeds", "equal", "measures"):
            values = getattr(self, key)
            if len(set(values)) < len(values):
                raise SettingError(key, f"{key}={[*values]} holds a value twice; keep one.")
        if self.tuning_seed in self.seeds and any(self._grid(label) for label in self.methods):
            raise SettingError(
                "tuning_seed",
                f"tuning_seed={self.tuning_seed} is one of the seeds, whose runs the choice would favour.",
            )
        _refuse_ours("job", self.job)
        for name, values in self.axes.items():
            if not isinstance(values, list | dict) or not values:
                raise SettingError(f"axes.{name}", f"axes.{name}={values!r} must be a list, or labels with keys.")
            if isinstance(values, dict) and not all(isinstance(keys, dict) for keys in values.values()):
                raise SettingError(
                    f"axes.{name}", f"axes.{name}: each label needs keys of the job, such as {{optim: sgd}}."
                )
            _refuse_ours("axes", {name: None} if isinstance(values, list) else {})
            for label, keys in values.items() if isinstance(values, dict) else ():
                _refuse_ours(f"axes.{name}.{label}", keys)
        for label in self.methods:
            self._check_method(label)
        for share in self.axes.get(NOISE, ()):
            if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share < 1:
                raise SettingError(f"axes.{NOISE}", f"axes.{NOISE}: {share!r} must be a number >= 0 and < 1.")

    def _check_method(self, label: str) -> None:
        own = self.methods[label]
        rule = own.get("scale_learning_rate", "none")
        if rule not in RULES:
            key = f"methods.{label}.scale_learning_rate"
            raise SettingError(key, f"{key}={rule!r} must be one of {', '.join(RULES)}.")
        _refuse_ours(f"methods.{label}", own)
        self._check_at(label, own.get("at", {}))
        grid = self._grid(label)
        for key, values in grid.items() if isinstance(grid, dict) else [("", grid)]:
            if not isinstance(values, list) or not values:
                place = f"methods.{label}.grid{key and '.'}{key}"
                raise SettingError(place, f"{place}={values!r} must be a list of values, such as [0.01, 0.1].")
        _refuse_ours(f"methods.{label}.grid", grid)
        for place, keys in (("", own), ("grid.", grid)):
            for key in keys if place else set(keys) - {*OF_METHOD}:
                self._refuse_axis(f"methods.{label}.{place}{key}", key, keys[key])

    def _check_at(self, label: str, at: Any) -> None:
        for axis, values in at.items() if isinstance(at, dict) else [("", at)]:
            place = f"methods.{label}.at{axis and '.'}{axis}"
            if axis not in self.axes:
                raise SettingError(
                    place, f"{place}: there is no such axis; there are {', '.join(self.axes) or 'none'}."
                )
            if not isinstance(values, list) or not values or any(value not in self.axes[axis] for value in values):
                known = ", ".join(map(str, self.axes[axis]))
                raise SettingError(place, f"{place}={values!r} must be a list of the axis's values: {known}.")

    def _refuse_axis(self, place: str, key: str, value: Any) -> None:
        """A method's key that an axis sets too: one of them would be without effect, and the table would not say so."""
        for axis, values in self.axes.items():
            for other, laid in _laid(axis, values):
                twice = key == other or (other.startswith(f"{key}.") and _holds(value, other[len(key) + 1 :]))
                if (twice or (key.startswith(f"{other}.") and _holds(laid, key[len(other) + 1 :]))) and key not in BOTH:
                    raise SettingError(place, f"{place} is set by axis {axis} too; remove it from one of them.")

    def _grid(self, label: str) -> Any:
        return self.methods[label].get("grid", {})

    def points(self) -> list[Keys]:
        """All combinations of the axes, each the label or value of every axis."""
        return [dict(zip(self.axes, chosen, strict=True)) for chosen in product(*self.axes.values())]

    def tried_at(self, label: str, point: Mapping[str, Any]) -> bool:
        """Whether a method is tried there."""
        return all(point[axis] in values for axis, values in self.methods[label].get("at", {}).items())

    def candidates(self, label: str) -> list[Keys]:
        """All combinations of a method's grid; [{}] where it has none."""
        grid = self._grid(label)
        return [dict(zip(grid, chosen, strict=True)) for chosen in product(*grid.values())]

    def job_of(self, label: str, point: Mapping[str, Any], chosen: Mapping[str, Any]) -> Keys:
        """The keys of the job of one run, without seed and output_dir."""
        keys: Keys = dict(self.job)
        self._lay_axes(keys, point)
        own = self.methods[label]
        lay_over(keys, {key: value for key, value in own.items() if key not in OF_METHOD})
        self._lay_axes(keys, point, dotted=True)  # into a block that the method brings
        lay_over(keys, chosen)
        batch = keys.get("global_batch_size", 32)
        rule = own.get("scale_learning_rate", "none")
        if rule != "none":
            batch = self._scaled(f"methods.{label}", rule, keys, batch)
        block = keys.get("consensus")
        replicas = block.get("replicas") if isinstance(block, dict) else None
        share = max(1, batch // replicas) if isinstance(replicas, int) and replicas > 1 else batch
        keys["per_device_train_batch_size"] = min(keys.get("per_device_train_batch_size", 8), share)
        return keys

    def _lay_axes(self, keys: Keys, point: Mapping[str, Any], *, dotted: bool = False) -> None:
        for axis, value in point.items():
            if axis != NOISE:
                laid = self.axes[axis][value] if isinstance(self.axes[axis], dict) else {axis: value}
                lay_over(keys, {key: v for key, v in laid.items() if "." in str(key) or not dotted})

    def _scaled(self, place: str, rule: str, keys: Keys, batch: int) -> int:
        """Let the rates follow the batch, in place; returns the batch with which the job begins."""
        reference, place = self.job.get("global_batch_size", 32), f"{place}.scale_learning_rate"
        if "batch_schedule" in keys:
            raise SettingError(
                place, f"{place}={rule}: where a batch_schedule moves the batch its lr_rule moves the rate; say by "
                "`at` where else the method is tried.",
            )  # fmt: skip
        if "learning_rate" not in keys:
            raise SettingError(place, f"{place}={rule} needs the learning_rate that it is to scale; add it.")
        if rule != "adascale":
            factor = (batch / reference) ** (1.0 if rule == "linear" else 0.5)
            groups = [dict(group) for group in keys.get("param_groups", [])]
            for rates in (keys, *(group for group in groups if "learning_rate" in group)):
                rates["learning_rate"] = float(rates["learning_rate"]) * factor
            keys |= {"param_groups": groups} if groups else {}
            return batch
        if batch == reference:
            return batch
        # The gain is that of a batch over the job's own, with which the first step is made.
        steps = [{"at_samples": 1, "global_batch_size": batch}]
        keys |= {
            "global_batch_size": reference,
            "batch_schedule": {"kind": "steps", "steps": steps, "lr_rule": "adascale"},
        }
        if "max_steps" in keys:
            keys["max_steps"] = keys["max_steps"] * batch // reference
        return reference


def _refuse_ours(place: str, keys: Mapping[str, Any]) -> None:
    for key in keys:
        if str(key).partition(".")[0] in OURS:
            raise SettingError(f"{place}.{key}", f"{place}.{key} is set by the comparison; remove it.")


def _laid(axis: str, values: Any) -> Iterator[tuple[str, Any]]:
    """Each key that an axis sets, with each of its values."""
    for value in values:
        yield from (values[value].items() if isinstance(values, dict) else [(axis, value)])


def _holds(block: Any, dotted: str) -> bool:
    """Whether a block has such a key inside."""
    for name in dotted.split("."):
        if not isinstance(block, Mapping) or name not in block:
            return False
        block = block[name]
    return True


def lay_over(keys: Keys, others: Mapping[str, Any]) -> None:
    """Set keys in place; a dotted one inside of a block, of which a copy is made."""
    for dotted, value in others.items():
        block, *path = keys, *str(dotted).split(".")
        for name in path[:-1]:
            inner = block.get(name)
            block[name] = dict(inner) if isinstance(inner, dict) else {}
            block = block[name]
        block[path[-1]] = value


KEYS = tuple(f.name for f in fields(CompareConfig))


@plain_dataclass(frozen=True)
class Comparison:
    """The settings, and the file that knows where each key stands."""

    config: CompareConfig
    file: ConfigFile

    def job_file(self, label: str, keys: Keys) -> ConfigFile:
        """One run's job as a file of its own, whose errors have the places of this one."""
        values = keys | {"output_dir": self.config.output_dir}
        places = dict(_inside(self.file.places, "job."))
        places |= {key: place for key, place in _inside(self.file.places, f"methods.{label}.")}
        places |= {key.removeprefix("grid."): place for key, place in places.items() if key.startswith("grid.")}
        return ConfigFile(path=self.file.path, values=values, places=places)


def _inside(places: Mapping[str, str], block: str) -> Iterator[tuple[str, str]]:
    return ((key.removeprefix(block), place) for key, place in places.items() if key.startswith(block))


def read_comparison(path: str | Path, overrides: Sequence[str] = ()) -> Comparison:
    """The settings of a YAML file with `key=value` overrides laid over it.

    Raises UserError, one line with the file, the line and the fix, for whatever is wrong beside the jobs themselves.
    """
    file = ConfigFile.read(path, overrides)
    with file.located():
        for key in file.values:
            if key not in KEYS:
                raise SettingError(str(key), f"unknown key {str(key)!r}{did_you_mean(str(key), KEYS)}")
        try:
            config = CompareConfig(**file.values)
        except ValidationError as error:
            raise _setting_error(error) from None
    return Comparison(config, file)


def _setting_error(error: ValidationError) -> SettingError:
    first = error.errors()[0]
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, SettingError):
        return cause
    key = ".".join(str(name) for name in first["loc"][:2] if isinstance(name, str))
    if first["type"] == "missing":
        return SettingError(key, f"{key} is missing: see docs/compare.md.")
    wish = first["msg"].removeprefix("Input should be ")
    return SettingError(key, f"{key}={first['input']!r:.60} must be {wish[0].lower()}{wish[1:]}.")
