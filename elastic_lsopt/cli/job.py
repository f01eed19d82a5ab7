"""A job as the command line reads it: the file, the settings and the method, each error with its file and line."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from elastic_lsopt.config.load import ConfigFile
from elastic_lsopt.config.settings import SettingError, TrainConfig, landscape_fields
from elastic_lsopt.config.spelling import did_you_mean
from elastic_lsopt.errors import UserError
from elastic_lsopt.optimizers import registry


@dataclass(frozen=True, kw_only=True)
class Job:
    """`file` knows the lines, `config` is checked, `method` is the landscape method with its own fields."""

    file: ConfigFile
    config: TrainConfig
    method: Any


def read_job(path: str | Path, overrides: Sequence[str] = ()) -> Job:
    """Read and check everything that needs neither the data nor the model.

    Raises UserError, one line with the place, for whatever is wrong.
    """
    file = ConfigFile.read(path, overrides)
    config = file.config()
    with file.located():
        if config.probes:
            from elastic_lsopt.training.probing.during_training import check_probes

            check_probes(config.probes)
        return Job(file=file, config=config, method=_method(config))


def _method(config: TrainConfig) -> Any:
    """The method, its fields checked one by one so that the message can name the line."""
    name, given = landscape_fields(config)
    try:
        known = get_type_hints(registry.get(name))
    except UserError as error:
        raise SettingError("landscape.method", str(error)) from None
    fields = {key: known[key] for key in registry.get(name).__dataclass_fields__}
    for key, value in given.items():
        if key not in fields:
            raise SettingError(f"landscape.{key}", f"method {name!r} has no field {key!r}{did_you_mean(key, fields)}")
        try:
            TypeAdapter(fields[key]).validate_python(value, strict=True)
        except ValidationError as error:
            wish = error.errors()[0]["msg"].removeprefix("Input should be ")
            raise SettingError(f"landscape.{key}", f"{key}={value!r} must be {wish}.") from None
    try:
        return registry.build(name, **given)
    except UserError as error:
        # A method's own message begins with the field that it is about.
        key = next((key for key in given if str(error).startswith(f"{key}=")), "method")
        raise SettingError(f"landscape.{key}", str(error)) from None
