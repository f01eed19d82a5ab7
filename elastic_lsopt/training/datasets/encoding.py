"""What becomes of a record: its token ids, and which of them are targets of the loss.

dataset_format   record                                           targets
text             {text: …}, or a text file                        all tokens, an end of document among them
text, with label {text: …, label: …} for a classifier             the class
chat             {messages: [{role, content}, …]}                 what the assistant says (chat.py)
completion       {prompt: …, completion: …}                       the completion and the end of the document
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from elastic_lsopt.config.settings import SettingError, TrainConfig
from elastic_lsopt.config.spelling import did_you_mean
from elastic_lsopt.training.datasets.chat import ChatEncoder, turns_of
from elastic_lsopt.training.datasets.encoded import Document
from elastic_lsopt.training.datasets.records import Record
from elastic_lsopt.training.datasets.tokens import FolderTokens, Tokens

Format = Literal["text", "chat", "completion"]
Packing = Literal["none", "concatenate", "documents"]
CONVERSATIONS = "conversations"
"""The field of the other common form of chat data, taken where there is no field of messages."""


@dataclass
class Cuts:
    """Documents that were `cut` at block_size, and those that are `left_out` because nothing to train on was left."""

    cut: int = 0
    left_out: int = 0


@dataclass(frozen=True)
class Encoder:
    """`documents(record)`: what a record becomes; raises SettingError naming its place."""

    documents: Callable[[Record], list[Document]]
    cuts: Cuts = field(default_factory=Cuts)


def wanted_fields(config: TrainConfig) -> frozenset[str]:
    """The fields of a record that a job may look at."""
    return frozenset(
        {
            config.dataset_text_field, config.dataset_label_field, config.dataset_messages_field, CONVERSATIONS,
            config.dataset_prompt_field, config.dataset_completion_field,
        }
    )  # fmt: skip


def format_of(config: TrainConfig, record: Record) -> Format:
    """The format that the settings name, else the one that the record's fields show.

    Raises SettingError where they show two, or none.
    """
    if config.dataset_format != "auto":
        return config.dataset_format
    if record.text is not None or config.task != "causal_lm":
        return "text"
    known, c = set(record.known), config
    shown: list[Format] = []
    if {c.dataset_messages_field, CONVERSATIONS} & known:
        shown.append("chat")
    if {c.dataset_prompt_field, c.dataset_completion_field} <= known:
        shown.append("completion")
    if c.dataset_text_field in known:
        shown.append("text")
    if len(shown) > 1:
        raise SettingError(
            "dataset_format",
            f"{record.place}: its fields ({', '.join(record.known)}) are those of {' and of '.join(shown)} data; say "
            f"which: dataset_format: {shown[0]}.",
        )
    return shown[0] if shown else "text"


def packing_of(config: TrainConfig, kind: Format) -> Packing:
    """How documents become samples: as the settings say, else text end to end and others one by one."""
    if config.packing == "concatenate" and kind != "text":
        raise SettingError(
            "packing",
            f"packing=concatenate would cut {kind} data in the middle of what is trained; use packing: documents.",
        )
    if config.packing != "auto":
        return config.packing
    return "concatenate" if kind == "text" and config.task == "causal_lm" else "none"


def encoder_of(config: TrainConfig, tokens: Tokens, kind: Format, packing: Packing) -> Encoder:
    """The function from a record to its documents. Raises SettingError for a tokenizer that cannot do it."""
    cuts = Cuts()
    if config.task == "sequence_classification":
        return Encoder(_labelled(config, tokens))
    if kind == "text":
        whole = _text(config, tokens)
        return Encoder(whole if packing == "concatenate" else _in_pieces(whole, config.block_size))
    one = _chat(config, tokens) if kind == "chat" else _completion(config, tokens)
    return Encoder(_cut(one, config.block_size, cuts), cuts)


def text_of(record: Record, text_field: str) -> bytes:
    """The text of a record as UTF-8. Raises SettingError for a field that is missing or no text."""
    if record.text is not None:
        return record.text
    return _words(record, "dataset_text_field", text_field).encode("utf-8", errors="replace")


def _value(record: Record, key: str, name: str) -> Any:
    if record.text is not None:
        raise SettingError(
            "dataset", f"{record.place}: plain text has no fields, and {key}={name} is asked for; give .jsonl records."
        )
    if name not in record.fields:
        hint = did_you_mean(name, list(record.known))
        raise SettingError(key, f"{record.place}: no field {name!r} ({key}){hint}")
    return record.fields[name]


def _words(record: Record, key: str, name: str) -> str:
    value = _value(record, key, name)
    if not isinstance(value, str):
        raise SettingError(key, f"{record.place}: field {name!r} must be text, got {value!r:.40}.")
    return value


def _text(config: TrainConfig, tokens: Tokens) -> Callable[[Record], list[Document]]:
    def documents(record: Record) -> list[Document]:
        text = text_of(record, config.dataset_text_field)
        if not text:
            return []
        ids = tokens.encode(text)
        if record.ends and tokens.end is not None:
            ids = np.append(ids, ids.dtype.type(tokens.end))
        return [Document(ids)]

    return documents


def _in_pieces(whole: Callable[[Record], list[Document]], limit: int) -> Callable[[Record], list[Document]]:
    """A document longer than `limit` becomes several; one token alone predicts nothing."""

    def documents(record: Record) -> list[Document]:
        pieces = (d.ids[i : i + limit] for d in whole(record) for i in range(0, len(d.ids), limit))
        return [Document(ids) for ids in pieces if len(ids) > 1]

    return documents


def _labelled(config: TrainConfig, tokens: Tokens) -> Callable[[Record], list[Document]]:
    name = config.dataset_label_field

    def documents(record: Record) -> list[Document]:
        if record.text is not None:
            raise SettingError(
                "dataset", f"{record.place}: plain text has no labels; classification needs .jsonl or .parquet records."
            )
        text = text_of(record, config.dataset_text_field)
        label = _value(record, "dataset_label_field", name)
        if not isinstance(label, int | str):
            raise SettingError(
                "dataset_label_field",
                f"{record.place}: field {name!r} must be a class, an integer or a name; got {label!r:.40}.",
            )
        return [Document(tokens.encode_whole(text, config.block_size), label=label)] if text else []

    return documents


def _chat(config: TrainConfig, tokens: Tokens) -> Callable[[Record], Document]:
    named = config.tokenizer_name_or_path or config.model_name_or_path
    if not isinstance(tokens, FolderTokens):
        raise SettingError(
            "tokenizer_name_or_path",
            "chat data goes through a tokenizer's chat template, and the bytes of a text have none; give "
            "tokenizer_name_or_path, the tokenizer of an instruct model.",
        )
    encoder = ChatEncoder(tokens.tokenizer, str(named), config.chat_template)

    def document(record: Record) -> Document:
        name = config.dataset_messages_field
        if name not in record.fields and CONVERSATIONS in record.fields:
            name = CONVERSATIONS
        turns = turns_of(_value(record, "dataset_messages_field", name), name, record.place)
        ids, trained = encoder.encode(turns, record.place)
        return Document(np.array(ids, tokens.dtype), trained)

    return document


def _completion(config: TrainConfig, tokens: Tokens) -> Callable[[Record], Document]:
    def document(record: Record) -> Document:
        prompt = _words(record, "dataset_prompt_field", config.dataset_prompt_field).encode("utf-8", "replace")
        answer = _words(record, "dataset_completion_field", config.dataset_completion_field).encode("utf-8", "replace")
        before, whole = tokens.encode(prompt), tokens.encode(prompt + answer)
        if not np.array_equal(whole[: len(before)], before):
            # A token would lie across the boundary. Who asks for a completion has encoded the prompt alone.
            whole = np.concatenate([before, tokens.encode(answer)])
        start = [] if tokens.start is None else [tokens.start]
        ids = np.concatenate([start, whole, [] if tokens.end is None else [tokens.end]])
        return Document(ids.astype(tokens.dtype), np.arange(len(ids)) >= len(start) + len(before))

    return document


def _cut(one: Callable[[Record], Document], limit: int, cuts: Cuts) -> Callable[[Record], list[Document]]:
    """A document is cut at `limit`; one whose first target lies behind it is left out, and both are counted."""

    def documents(record: Record) -> list[Document]:
        document = one(record)
        assert document.trained is not None
        trained = document.trained[:limit].copy()
        trained[:1] = False  # nothing predicts the first token
        cuts.cut += len(document.ids) > limit
        cuts.left_out += not trained.any()
        return [Document(document.ids[:limit], trained)] if trained.any() else []

    return documents


def cuts_in_words(cut: int, left_out: int) -> str | None:
    """What was lost, in a line; None where nothing was."""
    said = [f"{cut:,} records are longer than block_size and were cut there"] * bool(cut)
    said += [f"{left_out:,} records have nothing to train on within block_size and were left out"] * bool(left_out)
    return "; ".join(said) or None
