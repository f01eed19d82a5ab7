"""Classes that the data names: the model's config knows the names, in the order in which it was trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from elastic_lsopt.config.settings import SettingError, TrainConfig
from elastic_lsopt.training.building.models import build_model
from elastic_lsopt.training.datasets.samples import Data, build_data

pytestmark = pytest.mark.fast
BERT: dict[str, Any] = {
    "model_type": "bert", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2
}  # fmt: skip


def settings(path: Path, labels: list[Any], **given: Any) -> TrainConfig:
    path.mkdir(exist_ok=True)
    rows = [json.dumps({"text": f"text {i}", "label": label}) for i, label in enumerate(labels)]
    (path / "data.jsonl").write_text("\n".join(rows))
    fixed = {"output_dir": str(path / "out"), "max_steps": 1, "eval_fraction": 0.0, "block_size": 16}
    task = {"task": "sequence_classification", "dataset": str(path / "data.jsonl")}
    return TrainConfig(**({"model": BERT} | fixed | task | given))


def built(config: TrainConfig) -> tuple[Data, Any]:
    data = build_data(config)
    return data, build_model(config, classes=data.classes if data.labels_are_names else len(data.classes))


def labels_of(data: Data) -> list[int]:
    return [data.train[i][1] for i in range(len(data.train))]


def test_names_reach_the_config_and_come_back(tmp_path: Path) -> None:
    data, model = built(settings(tmp_path / "a", ["spam", "ham", "eggs", "ham"]))
    assert labels_of(data) == [2, 1, 0, 1] and data.labels_are_names
    model.save_pretrained(tmp_path / "saved")
    loaded = AutoConfig.from_pretrained(tmp_path / "saved")
    assert loaded.id2label == {0: "eggs", 1: "ham", 2: "spam"} and loaded.num_labels == 3
    assert loaded.label2id == {"eggs": 0, "ham": 1, "spam": 2}


def test_a_trained_model_keeps_its_order_and_its_classes(tmp_path: Path) -> None:
    """Alphabetical order would exchange what its head has learnt; a class without a sample stays."""
    names = {0: "spam", 1: "ham", 2: "eggs"}
    _, model = built(settings(tmp_path / "a", ["spam", "ham", "eggs"], model=BERT | {"id2label": names}))
    assert model.config.id2label == names
    model.save_pretrained(tmp_path / "saved")
    folder = {"model": None, "model_name_or_path": str(tmp_path / "saved")}
    data, again = built(settings(tmp_path / "b", ["ham", "spam", "ham"], **folder))
    assert labels_of(data) == [1, 0, 1] and data.classes == ("spam", "ham", "eggs")
    assert again.config.id2label == names
    assert not data.notes
    data, other = built(settings(tmp_path / "c", ["jam", "ham", "tea"], **folder))
    [note] = data.notes
    assert note.startswith("the model's own classes are spam, ham, eggs, the data's are ham, jam, tea: its head has")
    assert labels_of(data) == [1, 0, 2] and other.config.id2label == {0: "ham", 1: "jam", 2: "tea"}


def test_numbers_leave_the_models_names_alone(tmp_path: Path) -> None:
    _, model = built(settings(tmp_path / "a", ["no", "yes"]))
    model.save_pretrained(tmp_path / "saved")
    folder = {"model": None, "model_name_or_path": str(tmp_path / "saved")}
    data, again = built(settings(tmp_path / "b", [0, 1, 1], **folder))
    assert labels_of(data) == [0, 1, 1] and not data.labels_are_names
    assert again.config.id2label == {0: "no", 1: "yes"}


def test_a_label_out_of_range_is_one_line(tmp_path: Path) -> None:
    data = build_data(settings(tmp_path / "a", [0, 1, 4, 1, 7]))
    data.refuse_labels_beyond(8)
    with pytest.raises(SettingError, match=r"label 4 of sample 2 of the training part is outside of 0 … 2,") as raised:
        data.refuse_labels_beyond(3)
    assert "\n" not in str(raised.value)


def test_names_that_a_dataset_declares(tmp_path: Path) -> None:
    """`datasets` keeps numbers, and their names beside them; a trained model's order counts before the data set's."""
    import datasets

    names = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["y", "n", "?"])})
    table = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": [1, 0, 1]}, features=names)
    table.save_to_disk(tmp_path / "table")
    where = {"dataset": str(tmp_path / "table")}
    data, model = built(settings(tmp_path / "a", [], **where))
    assert labels_of(data) == [1, 0, 1] and model.config.id2label == {0: "y", 1: "n", 2: "?"}
    trained = BERT | {"id2label": {0: "n", 1: "y"}}
    data, model = built(settings(tmp_path / "a", [], **where, model=trained))
    assert labels_of(data) == [0, 1, 0] and model.config.id2label == {0: "n", 1: "y"}
