"""Data: what a source holds, what is held out, and the batches that come of it."""

from __future__ import annotations

import json
import math
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from elastic_lsopt.config.settings import SettingError, TrainConfig
from elastic_lsopt.training.datasets.bad_records import BadRecords
from elastic_lsopt.training.datasets.byte_pairs import bigram_entropy
from elastic_lsopt.training.datasets.held_out import held_out
from elastic_lsopt.training.datasets.records import STDLIB, Record, Source
from elastic_lsopt.training.datasets.samples import Data, build_data
from elastic_lsopt.training.datasets.tokens import END_OF_DOCUMENT, ByteTokens, FolderTokens

pytestmark = pytest.mark.fast
TORCH_MODEL = {"import": "elastic_lsopt.training.classifiers:mlp"}


def settings(dataset: Any, **given: Any) -> TrainConfig:
    fixed = {"output_dir": "out", "max_steps": 1, "model": {"model_type": "llama"}, "block_size": 16}
    return TrainConfig(dataset=str(dataset), **(fixed | given))


def jsonl(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def records(source: Any) -> list[Record]:
    return list(Source.of(str(source)).records(BadRecords(0)))


def tokens_in(samples: Any) -> list[int]:
    return [int(t) for i in range(len(samples)) for t in samples[i]]


def test_a_folder_is_its_text_files_in_order(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "z.md").write_text("zz")
    (tmp_path / "a.txt").write_text("aa")
    (tmp_path / "c.bin").write_bytes(b"\0")
    (tmp_path / "empty.py").write_text("")
    jsonl(tmp_path / "d.jsonl", [{"text": "one"}, {"text": ""}, {"text": "dé"}])
    found = [(r.name, r.text if r.text is not None else r.fields["text"]) for r in records(tmp_path)]
    assert found == [
        ("a.txt", b"aa"),
        ("b/z.md", b"zz"),
        ("d.jsonl#1", "one"),
        ("d.jsonl#2", ""),
        ("d.jsonl#3", "dé"),
    ]
    data = build_data(settings(tmp_path, eval_fraction=0, packing="none"))
    assert bytes(t for i in range(len(data.train)) for t in data.train[i][0] if t < 256) == "aazzonedé".encode()


def test_a_file_alone_is_cut_at_line_ends_and_loses_nothing(tmp_path: Path) -> None:
    text = b"".join(b"line %d of the file\n" % i for i in range(5000))
    (tmp_path / "a.txt").write_bytes(text)
    parts = records(tmp_path / "a.txt")
    assert len(parts) > 3 and b"".join(p.text or b"" for p in parts) == text
    assert all((p.text or b"").endswith(b"\n") for p in parts)
    assert [p.ends for p in parts] == [False] * (len(parts) - 1) + [True]
    data = build_data(settings(tmp_path / "a.txt", eval_fraction=0))
    assert END_OF_DOCUMENT not in tokens_in(data.train)[:-1]


def test_blocks_are_the_documents_end_to_end(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(bytes(range(100)))
    (tmp_path / "b.txt").write_bytes(bytes(range(200, 256)))
    data = build_data(settings(tmp_path, eval_fraction=0))
    stream = [*range(100), 256, *range(200, 256), 256]
    assert tokens_in(data.train) == stream[: len(stream) // 16 * 16]
    assert data.vocabulary_size == 257 and len(data.eval) == 0
    batch = data.collate([data.train[0], data.train[2]])
    assert batch["input_ids"].dtype == torch.int64 and torch.equal(batch["input_ids"], batch["labels"])
    assert batch["input_ids"].tolist() == [stream[:16], stream[32:48]]
    assert data.bytes_per_token == pytest.approx(156 / 158)


def test_held_out_documents_are_whole_and_stay_out_when_others_come(tmp_path: Path) -> None:
    names = [f"doc{i}" for i in range(2000)]
    out = held_out(names, 0.2)
    assert abs(out.mean() - 0.2) < 5 * math.sqrt(0.2 * 0.8 / 2000)
    assert np.array_equal(held_out(names[::-1], 0.2), out[::-1])
    assert np.array_equal(held_out(names[:1000], 0.2), out[:1000])
    assert not (out & ~held_out(names, 0.3)).any()

    path = jsonl(tmp_path / "d.jsonl", [{"text": chr(97 + i) * 40} for i in range(26)])
    data = build_data(settings(path, eval_fraction=0.3))
    trained, kept = set(tokens_in(data.train)) - {256}, set(tokens_in(data.eval)) - {256}
    assert trained and kept and not trained & kept


def test_neither_part_is_left_empty_by_chance() -> None:
    for names in (["a", "b"], [f"n{i}" for i in range(3)]):
        for fraction in (1e-6, 0.999999):
            out = held_out(names, fraction)
            assert 0 < out.sum() < len(names)
    with pytest.raises(SettingError, match="one document"):
        held_out(["a"], 0.1)
    assert not held_out(["a"], 0).any()


def test_bigram_entropy_is_that_of_a_known_chain() -> None:
    assert bigram_entropy([b"abababab"]) == 0
    # From a: b twice, a once; from b: a twice. H = 3/5 H(1/3).
    third = -(math.log(1 / 3) / 3 + 2 * math.log(2 / 3) / 3)
    assert bigram_entropy([b"aabab", b"ba"]) == pytest.approx(3 / 5 * third)
    assert math.isnan(bigram_entropy([b"a"]))
    text = Path(json.__file__).read_bytes()
    pairs, firsts = Counter(pairwise(text)), Counter(text[:-1])
    plain = -sum(n * math.log(n / firsts[a]) for (a, _), n in pairs.items()) / (len(text) - 1)
    assert bigram_entropy([text]) == pytest.approx(plain, rel=1e-12)


def test_the_standard_library() -> None:
    data = build_data(settings(STDLIB, block_size=128))
    names = [r.name for r in records(STDLIB)]
    assert names == sorted(names) and "json/decoder.py" in names
    assert not [n for n in names if n.startswith(("test/", "site-packages/")) or "/tests/" in n]
    assert data.bigram_entropy is not None and 2.35 < data.bigram_entropy < 2.50
    assert len(data.train) > 40_000 and 0.02 < len(data.eval) / len(data.train) < 0.15


def folder_tokenizer(folder: Path) -> Path:
    """Words of a small vocabulary, each whole text closed by <end>, saved as a Hugging Face tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = {w: i for i, w in enumerate(["<unk>", "<end>", "the", "cat", "sat"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A <end>", special_tokens=[("<end>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<end>")
    fast.save_pretrained(folder)
    return folder


def test_a_tokenizer_folder(tmp_path: Path) -> None:
    folder = folder_tokenizer(tmp_path / "tokenizer")
    path = jsonl(tmp_path / "d.jsonl", [{"body": "the cat sat"}, {"body": "the dog"}])
    data = build_data(
        settings(path, eval_fraction=0, block_size=2, dataset_text_field="body", tokenizer_name_or_path=str(folder))
    )
    assert tokens_in(data.train) == [2, 3, 4, 1, 2, 0]
    assert data.vocabulary_size == 5 and data.bytes_per_token == pytest.approx(18 / 7)
    assert FolderTokens(str(folder)).decode([2, 3, 1]) == "the cat"
    assert ByteTokens().decode(ByteTokens().encode("é".encode())) == "é"


def labelled(path: Path, **given: Any) -> Data:
    return build_data(settings(path, task="sequence_classification", eval_fraction=0, block_size=4, **given))


def test_classified_texts_are_padded_within_their_unit(tmp_path: Path) -> None:
    records = [{"text": "ab", "label": "no"}, {"text": "abcdef", "label": "yes"}, {"text": "c", "label": "no"}]
    data = labelled(jsonl(tmp_path / "d.jsonl", records))
    assert data.classes == ("no", "yes")
    batch = data.collate([data.train[i] for i in range(3)])
    assert batch["input_ids"].tolist() == [[97, 98, 256, 256], [97, 98, 99, 100], [99, 256, 256, 256]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]]
    assert batch["labels"].tolist() == [0, 1, 0]
    assert data.collate([data.train[0]])["input_ids"].shape == (1, 2)


def test_a_dataset_saved_by_datasets(tmp_path: Path) -> None:
    import datasets

    table = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": [0, 3, 1]})
    table.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": table, "test": table}).save_to_disk(tmp_path / "split")
    datasets.DatasetDict({"test": table}).save_to_disk(tmp_path / "other")
    for name in ("one", "split"):
        data = labelled(tmp_path / name)
        assert data.classes == ("0", "1", "2", "3")
        assert [int(data.train[i][1]) for i in range(3)] == [0, 3, 1]
    with pytest.raises(SettingError, match="no train split, only test"):
        labelled(tmp_path / "other")


def test_digits() -> None:
    from sklearn.datasets import load_digits

    data = build_data(settings("digits", task="classification", model=TORCH_MODEL, eval_fraction=0.2))
    assert len(data.train) + len(data.eval) == 1797 and 250 < len(data.eval) < 470
    batch = data.collate([data.train[i] for i in range(len(data.train))])
    assert batch["x"].dtype == torch.float32 and batch["labels"].dtype == torch.int64
    assert batch["x"].min() == 0 and batch["x"].max() == 1
    both = Counter(
        (tuple(np.rint(x * 16).astype(int).tolist()), y) for part in (data.train, data.eval) for x, y in part
    )
    digits = load_digits()
    assert both == Counter(
        (tuple(x.astype(int).tolist()), int(y)) for x, y in zip(digits.data, digits.target, strict=True)
    )


def test_bad_input_is_one_line_that_names_its_key(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "blank.txt").write_text("")
    (tmp_path / "short.txt").write_text("short")
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (tmp_path / "list.jsonl").write_text("[1]\n")
    good = jsonl(tmp_path / "good.jsonl", [{"txt": "hello", "label": 1.5}])
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "dataset_info.json").write_text("{")
    (broken / "state.json").write_text("{")
    texts = {"task": "sequence_classification"}
    wrong: list[tuple[dict[str, Any], str, str]] = [
        ({"dataset": tmp_path / "nope.txt"}, "dataset", "does not exist"),
        ({"dataset": "./nope"}, "dataset", "does not exist"),
        ({"dataset": tmp_path / "empty"}, "dataset", "no .txt"),
        ({"dataset": tmp_path / "blank.txt"}, "dataset", "no text"),
        ({"dataset": tmp_path / "short.txt", "eval_fraction": 0}, "block_size", "6 tokens, fewer than block_size=16"),
        ({"dataset": tmp_path / "short.txt"}, "eval_fraction", "one document"),
        ({"dataset": tmp_path / "broken.jsonl"}, "dataset", "broken.jsonl:2: not JSON"),
        ({"dataset": tmp_path / "list.jsonl"}, "dataset", "list.jsonl:1: a record must be an object"),
        ({"dataset": broken}, "dataset", "broken"),
        ({"dataset": good}, "dataset_text_field", "no field 'text' .*did you mean 'txt'"),
        ({"dataset": good, "dataset_text_field": "label"}, "dataset_text_field", "must be text, got 1.5"),
        ({"dataset": good, "dataset_text_field": "txt", **texts}, "dataset_label_field", "must be a class"),
        ({"dataset": tmp_path / "short.txt", **texts}, "dataset", "no labels"),
        ({"dataset": good, "tokenizer_name_or_path": str(tmp_path)}, "tokenizer_name_or_path", "no tokenizer in"),
    ]
    for given, key, message in wrong:
        with pytest.raises(SettingError, match=message) as caught:
            build_data(settings(**given))
        assert caught.value.key == key and "\n" not in str(caught.value), given
    for labels, message in (([1, "a"], "mixes"), ([-1, 0], "count from 0")):
        path = jsonl(tmp_path / "l.jsonl", [{"text": "a", "label": y} for y in labels])
        with pytest.raises(SettingError, match=message):
            labelled(path)
