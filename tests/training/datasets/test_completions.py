"""Prompts and completions: only the completion is trained, with its end, so that the model learns to stop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from elastic_lsopt.config.settings import SettingError, TrainConfig
from elastic_lsopt.optimizers.plain import Plain
from elastic_lsopt.training.datasets.samples import Data, build_data
from tests.training.datasets.small_tokenizers import byte_level

pytestmark = pytest.mark.fast


def completions(path: Path, records: list[Any], **given: Any) -> Data:
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    fixed = {"output_dir": "out", "max_steps": 1, "model": {"model_type": "llama"}, "block_size": 40}
    return build_data(TrainConfig(dataset=str(path), **(fixed | {"eval_fraction": 0.0} | given)))


def test_bytes(tmp_path: Path) -> None:
    data = completions(tmp_path / "c.jsonl", [{"prompt": "2+2=", "completion": "4"}, {"prompt": "", "completion": "é"}])
    ids, labels = data.train[0]
    assert ids.tolist() == [*b"2+2=4", 256] and labels.tolist() == [-100] * 4 + [ord("4"), 256]
    ids, labels = data.train[1]
    assert ids.tolist() == [*"é".encode(), 256] and labels.tolist() == [-100, "é".encode()[1], 256]
    batch = data.collate([data.train[0], data.train[1]])
    assert batch["input_ids"].tolist() == [[*b"2+2=4", 256], [*"é".encode(), 256, 256, 256, 256]]
    assert batch["attention_mask"].tolist() == [[1] * 6, [1] * 3 + [0] * 3]
    assert batch["labels"].tolist() == [[-100] * 4 + [52, 256], [-100, 169, 256] + [-100] * 3]


@pytest.mark.parametrize("begins", [False, True])
@pytest.mark.parametrize("prompt, completion", [("the cat", " sat on the mat"), ("the ca", "t sat"), ("the ", "cat")])
def test_a_token_across_the_boundary_is_none(tmp_path: Path, begins: bool, prompt: str, completion: str) -> None:
    """In "the cat" is a token " cat": where the prompt ends inside of it, it is encoded alone, as by who asks."""
    from transformers import AutoTokenizer

    folder = byte_level(tmp_path / "tokenizer", begins=begins)
    records = [{"question": prompt, "answer": completion}]
    data = completions(
        tmp_path / "c.jsonl", records, tokenizer_name_or_path=str(folder), dataset_format="completion",
        dataset_prompt_field="question", dataset_completion_field="answer",
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(folder)
    asked = tokenizer(prompt)["input_ids"]  # with <s>, if the tokenizer puts it there
    ids, labels = data.train[0]
    assert ids[: len(asked)].tolist() == asked and (labels[: len(asked)] == -100).all()
    assert (labels[len(asked) :] == ids[len(asked) :]).all() and (ids[0] == 1) == begins
    assert tokenizer.decode(ids[len(asked) :]) == f"{completion}<|im_end|>"


def test_bad_input_is_one_line(tmp_path: Path) -> None:
    good = {"prompt": "a", "completion": "b"}
    wrong: list[tuple[list[Any], dict[str, Any], str]] = [
        ([good, {"prompt": "a"}], {}, r"c.jsonl:2: no field 'completion' \(dataset_completion_field\)"),
        ([good, {"prompt": 1, "completion": "b"}], {}, "c.jsonl:2: field 'prompt' must be text, got 1"),
        ([{"prompt": "a"}], {}, "c.jsonl:1: no field 'text'"),
        ([good | {"text": "c"}], {}, "are those of completion and of text data; say which"),
        ([good], {"packing": "concatenate"}, "would cut completion data"),
    ]
    for records, given, message in wrong:
        with pytest.raises(SettingError, match=message) as caught:
            completions(tmp_path / "c.jsonl", records, **given)
        assert "\n" not in str(caught.value)
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(SettingError, match="plain text has no fields, and dataset_prompt_field=prompt is asked for"):
        build_data(
            TrainConfig(
                dataset=str(tmp_path / "a.txt"), dataset_format="completion", output_dir="out", max_steps=1,
                model={"model_type": "llama"},
            )
        )  # fmt: skip


def test_a_model_that_takes_no_padding_is_refused(tmp_path: Path) -> None:
    from elastic_lsopt.training.building.engines import build_engine
    from elastic_lsopt.world import World
    from tests.jobs import TINY

    path = tmp_path / "c.jsonl"
    path.write_text(json.dumps({"prompt": "a", "completion": "b"}))
    config = TrainConfig(dataset=str(path), output_dir="out", max_steps=1, model={"import": TINY}, eval_fraction=0.0)
    world: Any = World(0, 1, torch.device("cpu"), None)  # type: ignore[arg-type]
    with pytest.raises(SettingError, match=r"TinyLM.forward does not take a batch .* attention_mask.*concatenate"):
        build_engine(config, Plain(), build_data(config), world, total_samples=10)
