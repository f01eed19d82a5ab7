"""Chats: what the tokenizer's template makes of them, and that only what the assistant says is trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from elastic_lsopt.config.settings import SettingError, TrainConfig
from elastic_lsopt.training.datasets.samples import Data, build_data
from tests.training.datasets.small_tokenizers import CHATML, FORGETFUL, TAGGED, byte_level

pytestmark = pytest.mark.fast
CHAT = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "the cat?"},
    {"role": "assistant", "content": "sat on thé mat"},
    {"role": "user", "content": "and the dog?"},
    {"role": "assistant", "content": "the dog sat"},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer for each template."""
    home = tmp_path_factory.mktemp("tokenizers")
    for name, template in (("chatml", CHATML), ("tagged", TAGGED), ("forgetful", FORGETFUL), ("plain", None)):
        byte_level(home / name, template)
    return home


def settings(path: Path, records: list[Any], tokenizer: Path, **given: Any) -> TrainConfig:
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    fixed = {"output_dir": "out", "max_steps": 1, "model": {"model_type": "llama"}, "block_size": 200}
    return TrainConfig(
        dataset=str(path), tokenizer_name_or_path=str(tokenizer), **(fixed | {"eval_fraction": 0.0} | given)
    )


def chats(path: Path, records: list[Any], tokenizer: Path, **given: Any) -> Data:
    return build_data(settings(path, records, tokenizer, **given))


def said(data: Data, index: int = 0) -> tuple[str, str]:
    """The text of a sample, and of the labels that are not masked."""
    ids, labels = data.train[index]
    tokenizer = data.tokens.tokenizer  # type: ignore[union-attr]
    assert np.array_equal(ids[labels != -100], labels[labels != -100])
    return tokenizer.decode(ids), tokenizer.decode(labels[labels != -100])


WHOLE = (
    "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nthe cat?<|im_end|>\n<|im_start|>assistant\n"
    "sat on thé mat<|im_end|>\n<|im_start|>user\nand the dog?<|im_end|>\n<|im_start|>assistant\nthe dog sat<|im_end|>\n"
)


@pytest.mark.parametrize(
    "template, trained",
    [
        ("chatml", "sat on thé mat<|im_end|>\nthe dog sat<|im_end|>\n"),
        ("tagged", "sat on thé mat<|im_end|>the dog sat<|im_end|>"),
    ],
)
def test_only_the_assistant_is_trained(tmp_path: Path, folder: Path, template: str, trained: str) -> None:
    data = chats(tmp_path / "c.jsonl", [{"messages": CHAT}], folder / template)
    assert said(data) == (WHOLE, trained)
    assert data.bigram_entropy is None and data.bytes_per_token is None


def test_tags_are_read_as_transformers_reads_them(tmp_path: Path, folder: Path) -> None:
    data = chats(tmp_path / "c.jsonl", [{"messages": CHAT}], folder / "tagged")
    theirs = data.tokens.tokenizer.apply_chat_template(  # type: ignore[union-attr]
        CHAT, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, labels = data.train[0]
    assert ids.tolist() == theirs["input_ids"]
    assert (labels != -100).astype(int).tolist() == theirs["assistant_masks"]


def test_the_form_of_from_and_value(tmp_path: Path, folder: Path) -> None:
    names = {"user": "human", "assistant": "gpt"}
    other = [{"from": names.get(m["role"], m["role"]), "value": m["content"]} for m in CHAT]
    data = chats(tmp_path / "c.jsonl", [{"conversations": other, "id": 7}], folder / "chatml")
    assert said(data)[0] == WHOLE


def test_a_template_of_a_file(tmp_path: Path, folder: Path) -> None:
    """It goes before the tokenizer's own, and out with the tokenizer."""
    (tmp_path / "t.jinja").write_text(TAGGED)
    for name in ("plain", "chatml"):
        data = chats(
            tmp_path / "c.jsonl", [{"talk": CHAT}], folder / name,
            chat_template=str(tmp_path / "t.jinja"), dataset_messages_field="talk",
        )  # fmt: skip
        assert said(data) == (WHOLE, "sat on thé mat<|im_end|>the dog sat<|im_end|>")
        assert data.tokens.tokenizer.chat_template == TAGGED  # type: ignore[union-attr]


def test_what_the_tokens_cannot_tell_is_refused_by_line(tmp_path: Path, folder: Path) -> None:
    """One turn is exact under the same template: nothing of it is dropped."""
    thinking = [*CHAT[:2], {"role": "assistant", "content": "<think>hm</think>sat"}]
    records = [{"messages": thinking}, {"messages": [*thinking, *CHAT[3:]]}]
    assert said(chats(tmp_path / "c.jsonl", records[:1], folder / "forgetful"))[1] == "<think>hm</think>sat<|im_end|>\n"
    with pytest.raises(
        SettingError, match=r"c.jsonl:2: the tokens up to assistant turn 3 .*\{% generation %\}"
    ) as line:
        chats(tmp_path / "c.jsonl", records, folder / "forgetful")
    assert "\n" not in str(line.value)


def test_a_chat_is_cut_at_block_size_and_left_out_where_nothing_is_left(tmp_path: Path, folder: Path) -> None:
    records = [{"messages": CHAT}, {"messages": [CHAT[1] | {"content": "the cat " * 40}, CHAT[2]]}]
    data = chats(tmp_path / "c.jsonl", records, folder / "chatml", block_size=40)
    ids, labels = data.train[0]
    whole = data.tokens.tokenizer(WHOLE, add_special_tokens=False)["input_ids"]  # type: ignore[union-attr]
    assert len(data.train) == 1 and ids.tolist() == whole[:40] and (labels != -100).any()
    assert len(data.notes) == 1 and "2 records are longer than block_size" in data.notes[0]
    assert "1 records have nothing to train on within block_size" in data.notes[0]


def test_bad_input_is_one_line(tmp_path: Path, folder: Path) -> None:
    strict = "{{ raise_exception('roles must alternate') if messages[0].role == messages[-1].role }}" + CHATML
    byte_level(tmp_path / "strict", strict)
    good, path = {"messages": CHAT}, tmp_path / "c.jsonl"
    wrong: list[tuple[list[Any], str, dict[str, Any], str]] = [
        ([good], "plain", {}, "has no chat template, and chat data needs one; give .* chat_template: FILE.jinja"),
        ([good], "plain", {"chat_template": str(tmp_path / "no.jinja")}, "no.jinja cannot be read: No such file"),
        ([good], "chatml", {"tokenizer_name_or_path": None}, "bytes of a text have none; give tokenizer_name_or_path"),
        ([good, {"text": "a"}], "chatml", {}, r"c.jsonl:2: no field 'messages' \(dataset_messages_field\)"),
        ([{"messages": "hello"}], "chatml", {}, "c.jsonl:1: field 'messages' must be a list of messages"),
        ([{"messages": []}], "chatml", {}, "c.jsonl:1: field 'messages' must be a list of messages"),
        ([{"messages": [{"role": "user"}]}], "chatml", {}, "c.jsonl:1: message 1 of field 'messages' must have role"),
        ([{"messages": CHAT[:2]}], "chatml", {}, "c.jsonl:1: field 'messages' has no message of an assistant"),
        ([{"messages": CHAT[2:3] * 2}], str(tmp_path / "strict"), {}, "refuses it: roles must alternate"),
        ([good | {"text": "a"}], "chatml", {}, "are those of chat and of text data; say which: dataset_format: chat"),
        ([{"text": "a"}], "chatml", {"chat_template": "t.jinja"}, "is for chat data, but .* holds text data"),
        ([good], "chatml", {"packing": "concatenate"}, "would cut chat data .*; use packing: documents"),
        ([good], "chatml", {"block_size": 4}, "no record has anything to train on within block_size=4; raise"),
    ]
    for records, tokenizer, given, message in wrong:
        with pytest.raises(SettingError, match=message) as caught:
            config = settings(path, records, folder / tokenizer)
            build_data(TrainConfig(**(vars(config) | given)))
        assert "\n" not in str(caught.value), message
