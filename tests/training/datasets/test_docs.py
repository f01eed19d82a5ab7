"""Every example of docs/data.md is read as it stands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from elastic_lsopt.config.load import load_config
from elastic_lsopt.config.settings import TrainConfig
from elastic_lsopt.training.building.packed_models import KEEPS_DOCUMENTS_APART
from elastic_lsopt.training.datasets.samples import Data, build_data
from tests.docs.blocks import blocks
from tests.processes.ranks import ROOT
from tests.training.datasets.small_tokenizers import byte_level

pytestmark = pytest.mark.fast
PAGE = (ROOT / "docs/data.md").read_text(encoding="utf-8")
BLOCKS = [(block.language, block.text) for block in blocks("docs/data.md")]
FIXED = {"output_dir": "out", "max_steps": 1, "model": {"model_type": "llama"}, "block_size": 48}
EXAMPLES = [i for i, (language, _) in enumerate(BLOCKS) if language == "yaml"]


@pytest.fixture
def examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[dict[str, Any], Data]]:
    """(what the YAML says, its data) of each, with the files that stand before it."""
    monkeypatch.chdir(tmp_path)
    byte_level(tmp_path / "tokenizer")
    (tmp_path / "template.jinja").write_text(next(text for kind, text in BLOCKS if kind == "jinja"))
    made = []
    for i in EXAMPLES:
        (tmp_path / "data.jsonl").write_text(next(t for kind, t in reversed(BLOCKS[:i]) if kind == "jsonl"))
        given = yaml.safe_load(BLOCKS[i][1])
        (tmp_path / "job.yaml").write_text(yaml.safe_dump(FIXED | {"eval_fraction": 0.0} | given))
        config: TrainConfig = load_config(tmp_path / "job.yaml")
        made.append((given, build_data(config)))
    return made


def test_each_example_gives_samples_and_a_batch(examples: list[tuple[dict[str, Any], Data]]) -> None:
    assert len(examples) == 7 and len(BLOCKS) == 7 + 4 + 1
    for given, data in examples:
        assert len(data.train), given
        batch = data.collate([data.train[i] for i in range(len(data.train))])
        assert {"input_ids", "labels"} <= set(batch), given
    kinds = {given.get("dataset_format", given.get("task", "text")) for given, _ in examples}
    assert kinds == {"text", "chat", "completion", "sequence_classification"}
    [chat] = [data for given, data in examples if given.get("dataset_format") == "chat"]
    ids, labels = chat.train[0]
    decode = chat.tokens.tokenizer.decode  # type: ignore[union-attr]
    assert decode(labels[labels != -100]) == "It did.<|im_end|>"
    assert decode(ids) == ("<|im_start|>user\nDid it fall?<|im_end|>\n<|im_start|>assistant\nIt did.<|im_end|>\n")


def test_the_models_that_keep_documents_apart_are_listed() -> None:
    [listed] = re.findall(r"known to do this: (.*?)\. On others", PAGE, re.DOTALL)
    assert tuple(re.findall(r"`(\w+)`", listed)) == KEEPS_DOCUMENTS_APART
    [others] = re.findall(r"On others \((.*?)\)", PAGE, re.DOTALL)
    assert not set(re.findall(r"`(\w+)`", others)) & set(KEEPS_DOCUMENTS_APART)
