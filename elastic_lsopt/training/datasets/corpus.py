"""From where data lies to its tokens: records, read once, encoded and divided, in memory or in the cache on disk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from elastic_lsopt.config.settings import SettingError, TrainConfig
from elastic_lsopt.training.datasets.bad_records import BadRecords, bad_records
from elastic_lsopt.training.datasets.byte_pairs import BytePairs
from elastic_lsopt.training.datasets.encoded import Encoded, PartWriter
from elastic_lsopt.training.datasets.encoding import (
    Encoder,
    Format,
    Packing,
    cuts_in_words,
    encoder_of,
    format_of,
    packing_of,
    text_of,
    wanted_fields,
)
from elastic_lsopt.training.datasets.held_out import Division
from elastic_lsopt.training.datasets.records import Record, Source
from elastic_lsopt.training.datasets.token_cache import cached, key_of
from elastic_lsopt.training.datasets.tokens import Tokens


@dataclass(frozen=True)
class Corpus:
    """An encoded source: its two parts (all of it is in the first where no fraction is held out), and what it is."""

    source: Source
    kind: Format
    packing: Packing
    encoded: Encoded

    @property
    def notes(self) -> list[str]:
        """What a person should know of it, a line each."""
        facts, where = self.encoded.facts, f"{self.source.key}={self.source.name}"
        cut = cuts_in_words(facts["cut"], facts["left_out"])
        bad = bad_records(facts["bad"], facts["first_bad"]) if facts["bad"] else None
        return [f"{where}: {said}" for said in (cut, bad and f"without {bad}") if said]


def read_corpus(config: TrainConfig, tokens: Tokens, *, evaluation: bool = False) -> Corpus:
    """The corpus of `dataset`, or of `eval_dataset`, which is not divided.

    Raises SettingError, one line, for a source that is missing or holds no text, and for more bad records than are
    allowed.
    """
    if evaluation:
        assert config.eval_dataset is not None
        source, fraction = Source.of(config.eval_dataset, "eval_dataset"), 0.0
    else:
        source, fraction = Source.of(config.dataset), 0.0 if config.eval_dataset else config.eval_fraction
    kind = format_of(config, _first(config, source))
    if config.chat_template is not None and kind != "chat":
        raise SettingError("chat_template", f"chat_template is for chat data, but {source.name!r} holds {kind} data.")
    packing = packing_of(config, kind)
    encoder = encoder_of(config, tokens, kind, packing)
    reading = _Reading(config, source, tokens, fraction, kind, packing, encoder)
    settings = {
        "task": config.task, "kind": kind, "packing": packing, "fraction": fraction,
        "fields": [
            config.dataset_text_field, config.dataset_label_field, config.dataset_messages_field,
            config.dataset_prompt_field, config.dataset_completion_field,
        ],
        "block_size": None if packing == "concatenate" else config.block_size,
    }  # fmt: skip
    key = key_of(source, tokens.fingerprint, settings)
    encoded = cached(config.dataset_cache_dir, key, reading.encode)
    BadRecords(config.max_bad_records).refuse(encoded.facts["bad"], encoded.facts["first_bad"])
    return Corpus(source, kind, packing, encoded)


def _first(config: TrainConfig, source: Source) -> Record:
    """The first record that is no broken line. Raises SettingError where there is none."""
    for record in source.records(BadRecords(config.max_bad_records), wanted_fields(config)):
        return record
    raise _no_text(source)


def _no_text(source: Source) -> SettingError:
    return SettingError(
        source.key, f"{source.key}={source.name!r} holds no text; give a source with at least one document."
    )


@dataclass(frozen=True)
class _Reading:
    """All that a pass over the records needs."""

    config: TrainConfig
    source: Source
    tokens: Tokens
    fraction: float
    kind: Format
    packing: Packing
    encoder: Encoder

    def encode(self, columns_of: Callable[[str], Any]) -> Encoded:
        """Read all records into columns; twice where chance has left one of the parts without a document."""
        division = Division(self.fraction)
        encoded = self._pass(columns_of, division)
        if (other := division.exception()) is not None:
            encoded = self._pass(columns_of, Division(self.fraction, other))
        return encoded

    def _pass(self, columns_of: Callable[[str], Any], division: Division) -> Encoded:
        bad, cuts = BadRecords(self.config.max_bad_records), self.encoder.cuts
        cuts.cut = cuts.left_out = 0
        pairs = BytePairs() if self.kind == "text" and self.config.task == "causal_lm" else None
        row_tokens = self.config.block_size if self.packing == "documents" else None
        writers = {part: PartWriter(columns_of(part), self._columns, row_tokens) for part in ("training", "held_out")}
        labels: dict[int | str, int] = {}
        declared: tuple[str, ...] = ()
        read = 0
        for record in self.source.records(bad, wanted_fields(self.config)):
            try:
                documents = self.encoder.documents(record)
            except SettingError as error:
                bad.add(error)
                continue
            if documents:
                read += 1
                declared = record.classes.get(self.config.dataset_label_field, ())
                if pairs is not None:
                    pairs.add(text_of(record, self.config.dataset_text_field))
                writer = writers["held_out" if division.takes(record.name) else "training"]
                for document in documents:
                    label = 0 if document.label is None else labels.setdefault(_as_json(document.label), len(labels))
                    writer.append(document, label)
        if not read:
            if cuts.left_out:
                raise SettingError(
                    "block_size",
                    f"{self.source.key}={self.source.name!r}: no record has anything to train on within "
                    f"block_size={self.config.block_size}; raise block_size.",
                )
            bad.refuse(bad.count, bad.first)
            raise _no_text(self.source)
        facts = {
            "bad": bad.count, "first_bad": bad.first, "cut": cuts.cut, "left_out": cuts.left_out,
            "labels": list(labels), "declared": list(declared), "bytes": pairs.bytes if pairs else None,
            "bigram_entropy": pairs.entropy() if pairs else None,
        }  # fmt: skip
        return Encoded(writers["training"].close(), writers["held_out"].close(), facts)

    @property
    def _columns(self) -> dict[str, Any]:
        columns: dict[str, Any] = {"tokens": self.tokens.dtype}
        if self.packing != "concatenate":
            columns["ends"] = np.int64
        if self.kind != "text":
            columns["trained"] = np.bool_
        if self.config.task == "sequence_classification":
            columns["labels"] = np.int32
        return columns


def _as_json(label: int | str) -> int | str:
    """What a file of JSON gives back for it: True is 1 there."""
    return int(label) if isinstance(label, int) else label
