"""The reference of the keys follows from the settings; each key has an example, which its reader takes."""

from __future__ import annotations

import re
from dataclasses import MISSING, fields
from typing import Any

import pytest
import yaml
from pydantic_core import to_jsonable_python

from elastic_lsopt.config.compare import CompareConfig
from elastic_lsopt.config.elastic import ElasticConfig
from elastic_lsopt.config.lora import LoraConfig
from elastic_lsopt.config.pages import examples
from elastic_lsopt.config.pages.reference import PAGE, keys_text
from elastic_lsopt.config.probes import OWN
from elastic_lsopt.config.schedules import BatchScheduleConfig, LrSchedulerKwargs
from elastic_lsopt.config.settings import TrainConfig
from elastic_lsopt.config.study import Grid, StudyConfig
from tests.docs.blocks import blocks
from tests.docs.checks import yaml_block

pytestmark = pytest.mark.fast

TEXT = PAGE.read_text(encoding="utf-8")
JOBS, OTHERS = TEXT.split("## A study\n")
STUDIES, COMPARISONS = OTHERS.split("## A comparison\n")
SETTINGS: list[tuple[type, dict[str, str], str, str]] = [
    (TrainConfig, examples.JOB, JOBS, ""), (LoraConfig, examples.LORA, JOBS, "lora."),
    (LrSchedulerKwargs, examples.RATE, JOBS, "lr_scheduler_kwargs."),
    (BatchScheduleConfig, examples.BATCH, JOBS, "batch_schedule."),
    (ElasticConfig, examples.ELASTIC, JOBS, "elastic."), (StudyConfig, examples.STUDY, STUDIES, ""),
    (Grid, examples.GRID, STUDIES, "grid."), (CompareConfig, examples.COMPARE, COMPARISONS, ""),
]  # fmt: skip


def test_the_page_is_fresh() -> None:
    assert keys_text() == TEXT, "run: make schema"


@pytest.mark.parametrize(("kind", "given", "page", "prefix"), SETTINGS, ids=[kind.__name__ for kind, *_ in SETTINGS])
def test_each_key_has_its_default_and_an_example_that_sets_it(
    kind: type, given: dict[str, str], page: str, prefix: str
) -> None:
    assert [*given] == [f.name for f in fields(kind)]
    for f, (name, example) in zip(fields(kind), given.items(), strict=True):
        value: Any = yaml.safe_load(example)
        for key in f"{prefix}{name}".split("."):
            value = value[key]
        [part] = re.findall(rf"^### `{re.escape(prefix + name)}`.*?\n```yaml\n.*?```$", page, re.M | re.S)
        assert example in part
        default = re.search(r"Default: `(.*)`\.\n", part)
        if default:
            made = f.default if f.default_factory is MISSING else f.default_factory()
            assert yaml.safe_load(default[1]) == to_jsonable_python(made)
        else:
            assert name in ("dataset", "output_dir", "job", "methods") and "It must be given." in part


def test_the_readers_take_each_example() -> None:
    studies, comparisons = JOBS.count("\n"), JOBS.count("\n") + STUDIES.count("\n")
    read = [*blocks("docs/keys.md", "yaml")]
    assert len(read) > sum(len(given) for _, given, _, _ in SETTINGS) + len(OWN)
    for block in read:
        yaml_block(block, kind="compare" if block.line > comparisons else "study" if block.line > studies else "job")


@pytest.mark.parametrize(
    ("key", "says"),
    [
        ("`learning_rate`", "Peak learning rate; >= 0.\n\nTakes a number >= 0. Default: `5.0e-05`."),
        ("`elastic.lease_s`", "Takes a number > 0. Default: `2.0`."),
        ("`probes.NAME.budget`", "Takes a number > 0 and <= 1. Default: `0.1`."),
        ("`sam`", "| `radius` | one of model, parameter, row | `model` | What has length rho:"),
        ("`lamb`", "optim: lamb\noptim_args: {betas: [0.9, 0.999], eps: 1.0e-06, most: 10.0, vectors: true}"),
    ],
)
def test_some_of_them_by_hand(key: str, says: str) -> None:
    part = TEXT.partition(f"### {key}\n")[2].partition("\n### ")[0]
    assert says in part
