"""A job as the command line reads it: the file, the settings and the method, each error with its file and line."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from elastic_lsopt.config.import_paths import import_paths
from elastic_lsopt.config.load import ConfigFile
from elastic_lsopt.config.settings import SettingError, TrainConfig, landscape_fields
from elastic_lsopt.config.spelling import did_you_mean
from elastic_lsopt.errors import UserError
from elastic_lsopt.optimizers import registry
from elastic_lsopt.training.building.base_optimizer import check_updates
from elastic_lsopt.training.reporting.reporters import check_reporters


@dataclass(frozen=True, kw_only=True)
class Job:
    """`file` knows the lines, `config` is checked, `method` is the landscape method with its own fields."""

    file: ConfigFile
    config: TrainConfig
    method: Any


def read_job(path: str | Path, overrides: Sequence[str] = (), *, imports: bool = True) -> Job:
    """Read and check everything that needs neither the data nor the model.

    Without `imports` no code that the file names is run: what it is of is not checked, and its method is `none`. Raises
    UserError, one line with the place, for whatever is wrong.
    """
    return job_of(ConfigFile.read(path, overrides), imports=imports)


def job_of(file: ConfigFile, *, imports: bool = True) -> Job:
    """The same of a file that has been read."""
    config = file.config()
    code = () if imports else {re.split(r"[.[]", key)[0] for key, _ in import_paths(config)}
    with file.located():
        check_reporters(config)
        if config.probes and "probes" not in code:
            from elastic_lsopt.training.probing.during_training import check_probes

            check_probes(config.probes)
        if not {"optim", "param_groups"} & {*code}:
            check_updates(config)
        if config.averages and "averages" not in code:
            from elastic_lsopt.training.building.engines import averages_of

            averages_of(config)
        if config.consensus is not None and "consensus" not in code:
            from elastic_lsopt.training.building.rules import rule_of

            rule_of(config)
        if config.compute_metrics and "compute_metrics" not in code:
            from elastic_lsopt.training.evaluation import metrics_function

            metrics_function(config)
        method = registry.build("none") if "landscape" in code else _method(config)
        return Job(file=file, config=config, method=method)


def _method(config: TrainConfig) -> Any:
    """The method, its fields checked one by one so that the message can name the line."""
    name, given = landscape_fields(config)
    try:
        found = registry.get(name)
    except UserError as error:
        raise SettingError("landscape", str(error)) from None
    if not is_dataclass(found) or not callable(getattr(found, "gradient", None)):
        raise SettingError("landscape.import", f"{name} is no method: a dataclass with init and gradient.")
    known = get_type_hints(found)
    own = {field.name: known[field.name] for field in fields(found)}
    for key, value in given.items():
        if key not in own:
            raise SettingError(f"landscape.{key}", f"method {name!r} has no field {key!r}{did_you_mean(key, own)}")
        try:
            TypeAdapter(own[key]).validate_python(value, strict=True)
        except ValidationError as error:
            wish = error.errors()[0]["msg"].removeprefix("Input should be ")
            raise SettingError(f"landscape.{key}", f"{key}={value!r} must be {wish}.") from None
    try:
        return registry.build(name, **given)
    except UserError as error:
        # A method's own message begins with the field that it is about.
        key = next((key for key in given if str(error).startswith(f"{key}=")), "method")
        raise SettingError(f"landscape.{key}", str(error)) from None
