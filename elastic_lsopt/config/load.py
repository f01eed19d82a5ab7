"""A job's YAML file and the command line's `key=value`, as one `TrainConfig`; each error names file and line.

    config = load_config("configs/quickstart.yaml", ["learning_rate=1e-3", "landscape.rho=0.1"])

`ConfigFile` remembers where each key stands, for checks that come after loading (a method's own fields):

    file = ConfigFile.read(path, overrides)
    with file.located():
        ...                     # a SettingError raised in here becomes "FILE:LINE: message"
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from elastic_lsopt.config.deepspeed_json import check_job, read_deepspeed_json
from elastic_lsopt.config.elastic import ElasticConfig
from elastic_lsopt.config.lora import LoraConfig
from elastic_lsopt.config.pages.schema import allowed, setting
from elastic_lsopt.config.schedules import BatchScheduleConfig, LrSchedulerKwargs
from elastic_lsopt.config.settings import BUILTIN_DATASETS, REFUSED, SettingError, TrainConfig
from elastic_lsopt.config.spelling import did_you_mean
from elastic_lsopt.errors import UserError

KEYS = tuple(f.name for f in fields(TrainConfig))
BLOCKS = {
    "elastic": tuple(f.name for f in fields(ElasticConfig)),
    "lora": tuple(f.name for f in fields(LoraConfig)),
    "lr_scheduler_kwargs": tuple(f.name for f in fields(LrSchedulerKwargs)),
    "batch_schedule": tuple(f.name for f in fields(BatchScheduleConfig)),
}
"""Keys that hold settings of their own, and which."""
PATH_KEYS = (
    "model_name_or_path", "tokenizer_name_or_path", "dataset", "eval_dataset", "chat_template", "deepspeed",
    "resume_from_checkpoint", "elastic.secret_file",
)  # fmt: skip
HOME_KEYS = (*PATH_KEYS, "output_dir", "dataset_cache_dir", "elastic.preemption_notice_file")
NOT_PATHS = (*BUILTIN_DATASETS, "auto", "none")


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which reads 1e-3 as the number that it is (YAML 1.1 wants `1.0e-3`)."""


class _Dumper(yaml.SafeDumper):
    """Its counterpart, which therefore quotes a text such as a folder called 1e5."""


for _reader_or_writer in (_Loader, _Dumper):
    _reader_or_writer.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
    )


@dataclass(frozen=True, kw_only=True)
class ConfigFile:
    """What a YAML file and its overrides say, and where each key stands.

    `values` is the mapping as written, `places` maps a dotted key to "FILE:LINE" or the override.
    """

    path: Path
    values: dict[str, Any]
    places: dict[str, str]

    @classmethod
    def read(cls, path: str | Path, overrides: Sequence[str] = ()) -> "ConfigFile":
        """Read the file, then lay the overrides (`dotted.key=YAML value`) over it.

        Raises UserError for a missing file, broken YAML, a key that stands twice, and anything but a mapping.
        """
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise UserError(f"{path} does not exist; give the path of a job's YAML file.") from None
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path} cannot be read as UTF-8 text: {getattr(error, 'strerror', error)}.") from None
        lines: dict[str, int] = {}
        values = _parse(text, str(path), lines)
        if not isinstance(values, dict):
            raise UserError(f"{path} must hold a mapping of keys to values, such as `max_steps: 100`.")
        places = {key: f"{path}:{line}" for key, line in lines.items()}
        for override in overrides:
            _lay_over(values, places, override)
        return cls(path=path, values=values, places=places)

    def place(self, key: str) -> str:
        """Where a dotted key stands: its own line, else its block's, else the file."""
        while key and key not in self.places:
            key = key.rpartition(".")[0]
        return self.places.get(key, str(self.path))

    @contextmanager
    def located(self) -> Iterator[None]:
        """Give every SettingError that is raised inside its place."""
        try:
            yield
        except SettingError as error:
            raise UserError(f"{self.place(error.key)}: {error}") from None

    def config(self) -> TrainConfig:
        """The settings, checked; relative paths that exist beside the YAML only are resolved to there.

        Raises UserError with the place: an unknown key, a wrong value, values that contradict each other.
        """
        with self.located():
            for key in self.values:
                if key not in KEYS and key not in REFUSED:
                    raise SettingError(str(key), f"unknown key {str(key)!r}{did_you_mean(str(key), KEYS)}")
            for block, known in BLOCKS.items():
                given = self.values.get(block)
                for key in given if isinstance(given, dict) else ():
                    if key not in known:
                        dotted = f"{block}.{key}"
                        raise SettingError(dotted, f"unknown key {dotted!r}{did_you_mean(str(key), known)}")
            try:
                config = TrainConfig(**{key: self._resolved(key, value) for key, value in self.values.items()})
            except ValidationError as error:
                raise _setting_error(error, self.values) from None
            if config.deepspeed is not None:
                check_job(read_deepspeed_json(config.deepspeed), config)
        return config

    def _resolved(self, key: str, value: Any) -> Any:
        if key in BLOCKS and isinstance(value, dict):
            return {name: self._resolved(f"{key}.{name}", inner) for name, inner in value.items()}
        if key not in HOME_KEYS or not isinstance(value, str) or value in NOT_PATHS:
            return value
        here = Path(value).expanduser() if value.startswith("~") else Path(value)
        beside = self.path.parent / here
        if key in PATH_KEYS and not here.exists() and beside.exists():
            return str(beside)
        return str(here) if value.startswith("~") else value


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """The settings of a YAML file with `key=value` overrides laid over it.

    Raises UserError, one line with the file, the line and the fix, for whatever is wrong.
    """
    return ConfigFile.read(path, overrides).config()


def dump_config(config: TrainConfig) -> str:
    """The settings as YAML, every key written out; `load_config` reads it back to an equal config."""
    values = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(config).items()}
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False)  # ASCII: PyYAML does not escape NEL in unicode output


def _parse(text: str, source: str, lines: dict[str, int] | None = None) -> Any:
    """The value of a YAML text; `lines`, where given, is filled with the line of each dotted key."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        _mark(node, "", source, {} if lines is None else lines, set())
        return None if node is None else loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark and lines is not None else ""
        raise UserError(f"{source}{line}: broken YAML: {error.problem}.") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{source}: broken YAML: {' '.join(str(error).split())}.") from None
    except UserError:
        raise
    except ValueError as error:  # a date that is none
        raise UserError(f"{source}: broken YAML: {error}.") from None


def _mark(node: yaml.Node | None, prefix: str, source: str, lines: dict[str, int], seen: set[int]) -> None:
    if not isinstance(node, yaml.MappingNode) or id(node) in seen:
        return
    seen.add(id(node))  # an alias may lead back to its own anchor
    firsts: dict[tuple[str, str], int] = {}
    for key_node, value_node in node.value:
        if not isinstance(key_node, yaml.ScalarNode):
            continue  # no key of ours; the loader refuses what cannot be one
        line = key_node.start_mark.line + 1
        key, name = f"{prefix}{key_node.value}", (key_node.tag, key_node.value)
        if name in firsts:
            raise UserError(f"{source}:{line}: key {key!r} stands twice, first in line {firsts[name]}; keep one.")
        lines[key] = firsts[name] = line
        _mark(value_node, f"{key}.", source, lines, seen)


def _lay_over(values: dict[str, Any], places: dict[str, str], override: str) -> None:
    dotted, equals, text = override.partition("=")
    place = f"command line, {override!r}"
    if not equals or not all(dotted.split(".")):
        raise UserError(f"{place}: an override reads key=value or block.key=value.")
    block = values
    *outer, last = dotted.split(".")
    for depth, name in enumerate(outer):
        block = block.setdefault(name, {})
        if not isinstance(block, dict):
            raise UserError(f"{place}: {'.'.join(outer[: depth + 1])} is not a block of keys.")
    block[last] = _parse(text, place)
    for key in [key for key in places if key.startswith(f"{dotted}.")]:
        del places[key]
    places[dotted] = place


def _setting_error(error: ValidationError, values: dict[str, Any]) -> SettingError:
    """The first of pydantic's findings as a line that names the key, the value and what is allowed."""
    first = error.errors()[0]
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, SettingError):
        return cause
    names = [str(name) for name in first["loc"]]
    key = ".".join(names[:2] if names[0] in BLOCKS and isinstance(values.get(names[0]), dict) else names[:1])
    if first["type"] == "missing":
        return SettingError(key, f"{key} is missing: {setting(key)['description']}")
    value: Any = values
    for name in key.split("."):
        value = value[name]
    return SettingError(key, f"{key}={_short(value)} must be {allowed(key)}.")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
