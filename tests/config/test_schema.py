"""The shipped schema is the one that follows from the settings, and an editor that uses it agrees with us."""

import json
from pathlib import Path

import pytest
import yaml
from jsonschema import Draft202012Validator

from elastic_lsopt.config.load import load_config
from elastic_lsopt.config.pages.schema import SHIPPED, allowed, schema_text

pytestmark = pytest.mark.fast

# A study and a comparison have readers of their own.
SHIPPED_FILES = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
CONFIGS = [path for path in SHIPPED_FILES if not path.stem.startswith(("study", "compare"))]
SCHEMA = json.loads(SHIPPED.read_text(encoding="utf-8"))


def test_the_shipped_schema_is_fresh():
    assert SHIPPED.read_text(encoding="utf-8") == schema_text(), "run: python -m elastic_lsopt.config.pages.schema"
    Draft202012Validator.check_schema(SCHEMA)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_the_shipped_files_fit_the_schema_and_load(path):
    # YAML 1.2, which editors speak, reads 1e-3 as a number; PyYAML as text. So numbers are compared after loading.
    values = {k: float(v) if k == "learning_rate" else v for k, v in yaml.safe_load(path.read_text()).items()}
    Draft202012Validator(SCHEMA).validate(values)
    assert load_config(path).learning_rate == values["learning_rate"]


@pytest.mark.parametrize(
    "wrong",
    [{"learning_rte": 1}, {"learning_rate": -1}, {"optim": ""}, {"max_steps": 0}, {"landscape": {"rho": 1}},
     {"elastic": {"min_nodes": 0}}, {"elastic": {"max_node": 4}}, {"elastic": {"witness": "a:1"}},
     {"bf16": 1}, {"fsdp_reshard_after_forward": 0}, {"report_to": ["comet"]}, {"fp16": True}],
)  # fmt: skip
def test_the_schema_refuses_what_we_refuse(wrong):
    least = {"dataset": "python-stdlib", "output_dir": "runs/a", "model": {"model_type": "llama"}, "max_steps": 1}
    assert Draft202012Validator(SCHEMA).is_valid(least)
    assert not Draft202012Validator(SCHEMA).is_valid({**least, **wrong})


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("learning_rate", "a number >= 0"),
        ("adam_epsilon", "a number > 0"),
        ("warmup_ratio", "a number >= 0 and < 1"),
        ("max_steps", "an integer >= 1 or null"),
        ("bf16", "true or false"),
        ("fsdp_reshard_after_forward", "true or false or an integer >= 1"),
        ("lr_scheduler_type", "one of constant, linear, cosine, warmup_stable_decay, inverse_sqrt, autodrop"),
        ("report_to", "a list of one of tensorboard, wandb, trackio, mlflow"),
        ("deepspeed", "a non-empty string or a mapping or null"),
        ("elastic", "a mapping or null"),
        ("elastic.min_nodes", "an integer >= 1"),
        ("elastic.endpoint", "host:port or null"),
        ("elastic.lr_rule", "one of linear, sqrt, adascale, none or null"),
    ],
)
def test_the_range_in_words(key, words):
    assert allowed(key) == words
