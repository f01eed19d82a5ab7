"""A classifier's metrics on what is held out: the numbers of a plain loop and of scikit-learn at any world size."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from elastic_lsopt.cli.job_file import read_job
from elastic_lsopt.config.settings import SettingError, TrainConfig
from elastic_lsopt.training.datasets.samples import build_data
from elastic_lsopt.training.evaluation import classification_metrics, metrics_function
from tests.jobs import LLAMA, WORDS, Run, in_ranks, rows, write_job

fast = pytest.mark.fast
COUNTED = "tests.cases.elastic.job_metrics:counted"


@fast
def test_accuracy_and_macro_f1_are_scikit_learns() -> None:
    from sklearn.metrics import accuracy_score, f1_score

    draw = np.random.default_rng(0)
    for classes, n in ((2, 50), (5, 7), (9, 200), (3, 1)):
        labels, predicted = draw.integers(0, classes, n), draw.integers(0, classes, n)
        assert classification_metrics(predicted, labels) == pytest.approx(
            {"accuracy": accuracy_score(labels, predicted), "macro_f1": f1_score(labels, predicted, average="macro")}
        )


@pytest.fixture(scope="module")
def labelled(folder: Path) -> dict[str, Any]:
    """Sixty texts of three classes to train on, and nineteen to evaluate on: no full round of micro-batches."""
    for name, count, step in (("train", 60, 1), ("eval", 19, 3)):
        texts = [" ".join(WORDS[(i * k * step) % 10] for k in range(1, 2 + i % 5)) for i in range(1, count + 1)]
        records = [{"text": t, "label": WORDS[i % 3]} for i, t in enumerate(texts)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return {
        "dataset": str(folder / "train.jsonl"), "eval_dataset": str(folder / "eval.jsonl"), "eval_fraction": None,
        "task": "sequence_classification", "model": LLAMA, "backend": "replicated", "compute_metrics": COUNTED,
        "max_steps": 2, "warmup_ratio": None, "eval_steps": None, "save_steps": None,
    }  # fmt: skip


def test_the_metrics_of_a_job_are_a_plain_loops_at_any_world_size(run: Run, folder: Path, labelled: Any) -> None:
    from sklearn.metrics import accuracy_score, f1_score
    from transformers import AutoModelForSequenceClassification

    for world in (1, 3):
        run(world, write_job(folder / f"metrics{world}.yaml", **labelled))
    found = [rows(folder / f"metrics{world}")[2] for world in (1, 3)]
    names = ("eval_loss", "eval_accuracy", "eval_macro_f1", "eval_count", "eval_logits", "eval_order")
    assert [found[1][n] for n in names] == pytest.approx([found[0][n] for n in names], rel=1e-5)

    data = build_data(read_job(folder / "metrics1.yaml").config)
    model = AutoModelForSequenceClassification.from_pretrained(folder / "metrics1/model").eval()
    assert model.config.id2label == {0: "alpha", 1: "beta", 2: "gamma"}
    assert (len(data.train), len(data.eval)) == (60, 19)
    batches = [data.collate([data.eval[i]]) for i in range(19)]
    with torch.no_grad():
        logits = torch.cat([model(**b).logits for b in batches])
    labels = torch.cat([b["labels"] for b in batches]).numpy()
    predicted = logits.argmax(-1).numpy()
    assert found[0]["eval_accuracy"] == pytest.approx(accuracy_score(labels, predicted))
    assert found[0]["eval_macro_f1"] == pytest.approx(f1_score(labels, predicted, average="macro"))
    assert found[0]["eval_loss"] == pytest.approx(
        torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels)).item(), rel=1e-5
    )
    assert found[0]["eval_count"] == 19
    assert found[0]["eval_logits"] == pytest.approx(float((logits * torch.arange(1, 20)[:, None]).sum()), rel=1e-4)
    assert found[0]["eval_order"] == float((labels * np.arange(1, 20)).sum())


def test_a_function_that_fails_is_one_line_on_every_rank(ranks: Any, folder: Path, labelled: Any) -> None:
    wrong = {
        "fails": r"compute_metrics=\S+:fails failed at \S+job_metrics.py:\d+: no such score",
        "nothing": r"returned a NoneType; return \{name: number\}",
        "words": "'note' is 'well', no number",
        "taken": "returned 'eval_loss', which is the held-out loss",
    }
    for name, message in wrong.items():
        how = labelled | {"compute_metrics": COUNTED.replace("counted", name), "max_steps": 1}
        job = write_job(folder / f"metrics-{name}.yaml", **how)
        for said in in_ranks(ranks, 2, "refused", path=str(job)):
            assert re.search(message, said) and "\n" not in said


@fast
def test_bad_input_is_one_line(tmp_path: Path) -> None:
    fixed: dict[str, Any] = {
        "dataset": "x", "output_dir": "out", "max_steps": 1, "model": {"model_type": "bert"},
        "task": "sequence_classification",
    }  # fmt: skip
    for path, message in (("no.such:thing", "does not load"), ("json:nothing", "json has no 'nothing'")):
        with pytest.raises(SettingError, match=message) as said:
            metrics_function(TrainConfig(**fixed, compute_metrics=path))
        assert said.value.key == "compute_metrics" and "\n" not in str(said.value)
    with pytest.raises(SettingError, match="is a str; name a function"):
        metrics_function(TrainConfig(**fixed, compute_metrics="string:digits"))
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"task": "causal_lm", "compute_metrics": "a:b"}, "compute_metrics is for classification"),
        ({"compute_metrics": "a:b", "eval_fraction": 0.0}, "compute_metrics needs held-out data"),
        ({"eval_dataset": "y", "eval_fraction": 0.2}, "eval_fraction=0.2 does not go beside eval_dataset"),
        ({"packing": "documents"}, "packing=documents is for task causal_lm"),
        ({"chat_template": "t"}, "chat_template is for chat data"),
    ]
    for given, message in wrong:
        with pytest.raises(ValueError, match=message):
            TrainConfig(**(fixed | given))


@fast
def test_an_evaluation_set_of_its_own(tmp_path: Path) -> None:
    def settings(train: list[Any], held: list[Any], **given: Any) -> TrainConfig:
        for name, records in (("t", train), ("e", held)):
            (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
        fixed = {"output_dir": "out", "max_steps": 1, "model": {"model_type": "bert"}, "block_size": 4}
        where = {"dataset": str(tmp_path / "t.jsonl"), "eval_dataset": str(tmp_path / "e.jsonl")}
        return TrainConfig(**(fixed | where | {"task": "sequence_classification"} | given))

    def label(*labels: Any) -> list[Any]:
        return [{"text": "abc", "label": given} for given in labels]

    data = build_data(settings(label("b", "c", "a"), label("c", "a")))
    assert data.classes == ("a", "b", "c") and data.eval.labels.tolist() == [2, 0]  # type: ignore[attr-defined]
    with pytest.raises(SettingError, match=r"eval_dataset=.*has label 'd', which no training sample has; .* a, b, c"):
        build_data(settings(label("b", "c", "a"), label("d")))
    with pytest.raises(SettingError, match="names its classes in another way than dataset: 1 and 'b'"):
        build_data(settings(label("b"), label(1)))
    with pytest.raises(SettingError, match=r"e\.jsonl:1: no field 'text'"):
        build_data(settings(label("b"), [{}]))
    texts = {"task": "causal_lm", "model": {"model_type": "llama"}}
    data = build_data(settings([{"text": "aaaaaaa"}], [{"text": "bbbbbbb"}], **texts))
    assert {int(t) for i in range(len(data.train)) for t in data.train[i]} == {97, 256} and len(data.train) == 2
    assert {int(t) for i in range(len(data.eval)) for t in data.eval[i]} == {98, 256}
    with pytest.raises(SettingError, match=r"holds completion data and dataset=.* text data"):
        build_data(settings([{"text": "aaaaaaa"}], [{"prompt": "b", "completion": "c"}], **texts))
