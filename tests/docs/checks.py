"""What a block of a page must pass where no test runs it: YAML is a job's settings, a command is one that there is.

Each check raises AssertionError, with the block and the reason, for what a reader could not use as it stands. `beside`
are the files that the page has the reader save.
"""

from __future__ import annotations

import importlib.util
import json
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import chdir, contextmanager, redirect_stderr
from functools import cache
from io import StringIO
from itertools import dropwhile, takewhile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from elastic_lsopt.cli.job_file import read_job
from elastic_lsopt.cli.main import command_line
from elastic_lsopt.config.compare import read_comparison
from elastic_lsopt.config.deepspeed_json import read_deepspeed_json
from elastic_lsopt.config.study import read_study
from elastic_lsopt.errors import UserError
from tests.docs.blocks import Block, commands_of
from tests.processes.warm import ROOT

Files = Mapping[str, str]
"""By name: what a reader has saved beside what is checked."""
NOTHING: Files = {}

LEAST: dict[str, Any] = {
    "model": {"model_type": "llama"}, "dataset": "python-stdlib", "output_dir": "runs/a", "max_steps": 1,
}  # fmt: skip
"""What a page's YAML leaves out, where it shows some keys of a job only."""
OUT = {"output_dir": LEAST["output_dir"]}
LEAST_OF: dict[str, dict[str, Any]] = {
    "job": LEAST, "study": OUT,
    "compare": OUT | {"job": {k: v for k, v in LEAST.items() if k not in OUT}, "methods": {"adamw": {}}},
}  # fmt: skip
READERS_BY = {"grid": "study", "methods": "compare"}
"""Keys by which a file is known for a study's or a comparison's."""
INSTEAD = {"model": "model_name_or_path", "max_steps": "num_train_epochs"}
MODULES = {"elastic_lsopt.train": ["train"], "elastic_lsopt.agent": ["agent"], "elastic_lsopt": []}
FILES = ("configs/", "examples/", "launch/", "benchmarks/", "tests/")
"""A word of a command that begins so is a file of this repository."""
NOT_RUN = {
    "sbatch": "needs a Slurm cluster; tests/launch/test_slurm.py starts one, and its scripts there",
    "kubectl": "needs a Kubernetes cluster; tests/launch/test_kubernetes.py checks what it is given",
    "sky": "needs a cloud; tests/launch/test_skypilot.py checks what it is given",
    "export": "sets a variable of the reader's shell",
    "cd": "moves in the reader's own folders",
    "git": "fetches from wherever the reader has it",
}
"""Programs whose commands are looked at only for the files that they name, and why."""


def yaml_block(block: Block, beside: Files = NOTHING, kind: str = "") -> None:
    """It is a job's settings or some of them, a study's (which have a `grid`) or a comparison's (`methods`), as
    `elastic-lsopt` reads them."""
    given = _loaded(block) or {}
    kind = kind or next((READERS_BY[key] for key in READERS_BY if key in given), "job")
    missing = {k: v for k, v in LEAST_OF[kind].items() if not {k, INSTEAD.get(k)} & {*given}}
    text = f"{block.text}\n{yaml.safe_dump(missing) if missing else ''}"
    with _saved({**beside, "job.yaml": text}) as folder:
        _read(block, READERS[kind], folder / "job.yaml", [])


def shell_block(block: Block, beside: Files = NOTHING) -> None:
    """Each of its commands is one that there is, with arguments that it takes, and names files that are there."""
    for typed in commands_of(block.text):
        words = [*dropwhile(re.compile(r"[A-Z_]+=").match, takewhile(lambda word: word not in (">", ">>"), typed))]
        for word in words:
            path = word.strip("'\"").partition("=")[2] or word
            assert not path.startswith(FILES) or (ROOT / path).exists(), f"{block}: {path} does not exist"
        _command(block, words, beside)


def json_block(block: Block, beside: Files = NOTHING) -> None:
    """It is JSON, a value a line in `jsonl`; where it has DeepSpeed's keys, one that we take."""
    for text in block.text.splitlines() if block.language == "jsonl" else [block.text]:
        value = json.loads(text)
        if isinstance(value, dict) and "zero_optimization" in value:
            _read(block, lambda given, _: read_deepspeed_json(given), value, [])


def _command(block: Block, words: list[str], beside: Files) -> None:
    match words:
        case ["elastic-lsopt", *arguments]:
            _ours(block, arguments, beside)
        case ["make", target]:
            assert target in _targets(), f"{block}: make has no target {target}"
        case ["pip", "install", *what]:
            for extra in re.findall(r"elastic_lsopt\[([\w,]+)\]", " ".join(what)):
                assert set(extra.split(",")) <= _extras(), f"{block}: no extra {extra}"
        case [("python" | "torchrun" | "deepspeed" | "mpirun") as launcher, *arguments]:
            if launcher == "torchrun":
                from torch.distributed.run import get_args_parser

                _parsed(block, get_args_parser().parse_args, arguments)
            _program(block, arguments, beside)
        case [program, *_]:
            assert program in NOT_RUN, f"{block}: nothing here checks a command of {program}; say in NOT_RUN why not"


def _program(block: Block, arguments: list[str], beside: Files) -> None:
    """What a launcher is to start: a module, or a file."""
    for i, word in enumerate(arguments):
        if word in ("-m", "--module"):
            module, *rest = arguments[i + 1 :]
            if module in MODULES:
                return _ours(block, [*MODULES[module], *rest], beside)
            assert importlib.util.find_spec(module), f"{block}: there is no module {module}"
            return None
        if word.endswith(".py"):
            assert word in beside or (ROOT / word).exists(), f"{block}: {word} does not exist"
            return None
    raise AssertionError(f"{block}: {arguments} names no program")


def _ours(block: Block, arguments: list[str], beside: Files) -> None:
    given = _parsed(block, command_line().parse_args, arguments)
    if given.command in ("train", "agent", "validate", "plan", "study", "compare"):
        with _saved({"job.yaml": yaml.safe_dump(LEAST), **beside}) as folder:
            path = next((at / given.file for at in (folder, ROOT) if (at / given.file).exists()), folder / "job.yaml")
            _read(block, READERS.get(given.command, _job), path, given.overrides)


@contextmanager
def _saved(files: Files) -> Iterator[Path]:
    with TemporaryDirectory() as folder:
        for name, text in files.items():
            (Path(folder) / name).write_text(text)
        yield Path(folder)


def _job(path: Path, overrides: list[str]) -> None:
    read_job(path, overrides, imports=False)


READERS: dict[str, Callable[[Any, list[str]], object]] = {
    "job": _job, "study": read_study, "compare": read_comparison,
}  # fmt: skip


def _read(block: Block, reader: Callable[[Any, list[str]], object], what: Any, overrides: list[str]) -> None:
    with chdir(ROOT):
        try:
            reader(what, overrides)
        except UserError as error:
            raise AssertionError(f"{block}: {error}") from None


def _loaded(block: Block) -> dict[str, Any] | None:
    try:
        return yaml.safe_load(block.text)
    except yaml.YAMLError as error:
        raise AssertionError(f"{block}: {error}") from None


def _parsed(block: Block, parse: Callable[[list[str]], Any], arguments: list[str]) -> Any:
    with redirect_stderr(StringIO()) as said:
        try:
            return parse(arguments)
        except SystemExit:
            raise AssertionError(f"{block}: {arguments}: {said.getvalue().splitlines()[-1]}") from None


@cache
def _targets() -> set[str]:
    return {*re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)}


@cache
def _extras() -> set[str]:
    return {*tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]}
