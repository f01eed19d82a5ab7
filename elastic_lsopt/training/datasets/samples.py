"""What a job trains and evaluates on: two map-style datasets, and the function that makes a batch of samples.

    task                       sample
    causal_lm                  block_size tokens; a document; or several, packed (`packing`)
    sequence_classification    a text's tokens and its class
    classification (digits)    64 numbers in 0 … 1 and a class

Deterministic: the same files and settings give the same samples on every rank. Tokens take 2 bytes up to 65,536 ids,
else 4; a large corpus lies in files that are mapped (`token_cache.py`), so memory does not grow with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np

from elastic_lsopt.config.settings import SettingError, TrainConfig
from elastic_lsopt.elastic.worker.same_data import Identity, digest_of
from elastic_lsopt.training.building.models import class_names
from elastic_lsopt.training.datasets.batches import (
    Collate,
    Documents,
    LabelledTexts,
    LabelledVectors,
    PackedDocuments,
    Samples,
    TokenBlocks,
    collate_blocks,
    collate_documents,
    collate_packed,
    collate_texts,
    collate_vectors,
)
from elastic_lsopt.training.datasets.corpus import Corpus, read_corpus
from elastic_lsopt.training.datasets.encoded import EncodedPart
from elastic_lsopt.training.datasets.held_out import held_out
from elastic_lsopt.training.datasets.tokens import Tokens, tokens_of


@dataclass(frozen=True, kw_only=True)
class Data:
    """`eval` has length 0 where nothing is held out; `collate` is a pure function of the samples it is given."""

    train: Samples
    eval: Samples
    collate: Collate
    tokens: Tokens | None = None
    """The vocabulary of text; None for numbers."""
    classes: tuple[str, ...] = ()
    """Names of the classes, by label; empty for causal_lm."""
    labels_are_names: bool = False
    """Whether the source names the classes, so that the model's config should; else `classes` are the numbers."""
    bigram_entropy: float | None = None
    """Text: H(next byte | byte) of the whole corpus, in nats a byte."""
    bytes_per_token: float | None = None
    """Text: of the whole corpus; a loss in nats a token, divided by this, is in nats a byte."""
    notes: tuple[str, ...] = ()
    """What a person should know of the data, a line each: what was cut, which records are bad."""

    @property
    def vocabulary_size(self) -> int | None:
        """Ids of the vocabulary; None for numbers."""
        return self.tokens.size if self.tokens else None

    @cached_property
    def identity(self) -> Identity:
        """What must be the same on all ranks: lengths, and digests of all content."""
        parts = (("training", self.train), ("held-out", self.eval))
        sizes = {f"{name} samples": len(samples) for name, samples in parts}
        digests = {f"digest of the {name} part": samples.digest for name, samples in parts}
        return {
            **sizes,
            **digests,
            "classes": len(self.classes),
            "digest of their names": digest_of(np.array(self.classes)),
        }

    def refuse_labels_beyond(self, classes: int) -> None:
        """Raise SettingError naming the first label that is none of the model's `classes`, and its sample."""
        for part, samples in (("training", self.train), ("held-out", self.eval)):
            labels = np.asarray(getattr(samples, "labels", ()))
            if (labels >= classes).any():
                first = int((labels >= classes).argmax())
                raise SettingError(
                    "model.num_labels",
                    f"label {labels[first]} of sample {first} of the {part} part is outside of 0 … {classes - 1}, the "
                    "classes of the model; leave num_labels out (it follows the data) or mend the labels.",
                )


def build_data(config: TrainConfig) -> Data:
    """Read `config.dataset` for `config.task`.

    Raises SettingError, one line, for a missing path or field and for too little data.
    """
    builders = {"causal_lm": _causal_lm, "sequence_classification": _sequence_classification}
    return builders[config.task](config, tokens_of(config)) if config.task in builders else _digits(config)


def _causal_lm(config: TrainConfig, tokens: Tokens) -> Data:
    corpus = read_corpus(config, tokens)
    held = read_corpus(config, tokens, evaluation=True) if config.eval_dataset else None
    if held is not None and (held.kind, held.packing) != (corpus.kind, corpus.packing):
        raise SettingError(
            "eval_dataset",
            f"eval_dataset={config.eval_dataset!r} holds {held.kind} data and dataset={config.dataset!r} {corpus.kind} "
            "data; give two of one format.",
        )
    evaluation = corpus.encoded.held_out if held is None else held.encoded.training
    facts, padding = corpus.encoded.facts, tokens.padding or 0
    collates: dict[str, Collate] = {
        "concatenate": collate_blocks,
        "none": partial(collate_documents, padding=padding),
        "documents": partial(collate_packed, padding=padding),
    }
    size = sum(len(part["tokens"]) for part in (corpus.encoded.training, corpus.encoded.held_out))
    return Data(
        train=_samples(config, corpus, corpus.encoded.training, "training"),
        eval=_samples(config, held or corpus, evaluation, "held-out"),
        collate=collates[corpus.packing],
        tokens=tokens,
        bigram_entropy=facts["bigram_entropy"],
        bytes_per_token=None if facts["bytes"] is None else facts["bytes"] / size,
        notes=(*corpus.notes, *(held.notes if held is not None else ())),
    )


def _samples(config: TrainConfig, corpus: Corpus, part: EncodedPart, name: str) -> Samples:
    if corpus.packing != "concatenate":
        return Documents(part) if corpus.packing == "none" else PackedDocuments(part)
    blocks = TokenBlocks(part["tokens"], config.block_size, part.digest)
    if len(part["tokens"]) and not len(blocks):
        raise SettingError(
            "block_size",
            f"the {name} part of {corpus.source.key}={corpus.source.name!r} has {len(part['tokens'])} tokens, fewer "
            f"than block_size={config.block_size}; lower block_size, give more text, or change eval_fraction.",
        )
    return blocks


def _sequence_classification(config: TrainConfig, tokens: Tokens) -> Data:
    if tokens.padding is None:
        raise SettingError(
            "tokenizer_name_or_path",
            f"the tokenizer {config.tokenizer_name_or_path or config.model_name_or_path!r} has neither a padding nor "
            "an end token, and texts of a batch must be padded; set its pad_token and save it again.",
        )
    corpora = [read_corpus(config, tokens)]
    if config.eval_dataset:
        corpora.append(read_corpus(config, tokens, evaluation=True))
    given = [_named(corpus.encoded.facts["labels"], corpus.encoded.facts["declared"]) for corpus in corpora]
    declared = tuple(corpora[0].encoded.facts["declared"])
    own = class_names(config)
    learnt = own if config.model_name_or_path is not None else ()
    classes, numbers = _classes(given[0], config.dataset_label_field, own, declared)
    named = isinstance(given[0][0], str)
    numbers_of_eval = numbers if len(given) == 1 else _numbered(config, given[1], classes, given[0])
    held = corpora[-1].encoded.training if config.eval_dataset else corpora[0].encoded.held_out
    return Data(
        train=LabelledTexts(corpora[0].encoded.training, numbers),
        eval=LabelledTexts(held, numbers_of_eval),
        collate=partial(collate_texts, padding=tokens.padding),
        tokens=tokens,
        classes=classes,
        labels_are_names=named,
        notes=(
            *(note for corpus in corpora for note in corpus.notes),
            *(_other_names(learnt, classes) if named and learnt else ()),
        ),
    )


def _named(labels: list[Any], declared: Sequence[str]) -> list[Any]:
    """The names of numbers, where the source declares a name for each."""
    known = bool(declared) and all(isinstance(label, int) and 0 <= label < len(declared) for label in labels)
    return [declared[label] for label in labels] if known else labels


def _classes(given: list[Any], field: str, *known: tuple[str, ...]) -> tuple[tuple[str, ...], list[int]]:
    """Integers are labels already, 0 … largest. Names are numbered as in the first of `known` that has them all (the
    model's own first: its head would have to learn another order), else in alphabetical order.
    """
    if all(isinstance(label, int) for label in given):
        if min(given) < 0:
            raise SettingError("dataset_label_field", f"field {field!r} holds {min(given)}; classes count from 0.")
        return tuple(str(i) for i in range(max(given) + 1)), [int(label) for label in given]
    if not all(isinstance(label, str) for label in given):
        raise SettingError("dataset_label_field", f"field {field!r} mixes integers and names; use one of them.")
    names = next((list(names) for names in known if set(given) <= set(names)), sorted(set(given)))
    number = {name: i for i, name in enumerate(names)}
    return tuple(names), [number[label] for label in given]


def _other_names(own: tuple[str, ...], classes: tuple[str, ...]) -> list[str]:
    """What a person is told where a pretrained classifier was trained on classes of other names."""
    unnamed = own == tuple(f"LABEL_{i}" for i in range(len(own)))  # as Hugging Face calls them where nobody has
    if unnamed or own == classes:
        return []
    return [
        f"the model's own classes are {', '.join(own)}, the data's are {', '.join(classes)}: its head has learnt the "
        "former, and learns the latter in their places"
    ]


def _numbered(config: TrainConfig, labels: list[Any], classes: tuple[str, ...], trained: list[Any]) -> list[int]:
    """The numbers of the labels of eval_dataset, by what training has."""
    where = f"eval_dataset={config.eval_dataset!r}"
    if any(isinstance(label, str) != isinstance(trained[0], str) for label in labels):
        raise SettingError("eval_dataset", f"{where} names its classes in another way than dataset: {labels[0]!r} and "
                           f"{trained[0]!r}; use numbers in both or names in both.")  # fmt: skip
    if not isinstance(trained[0], str):
        return [int(label) for label in labels]
    if unknown := [label for label in labels if label not in classes]:
        raise SettingError(
            "eval_dataset",
            f"{where} has label {unknown[0]!r}, which no training sample has; the classes are {', '.join(classes)}.",
        )
    return [classes.index(label) for label in labels]


def _digits(config: TrainConfig) -> Data:
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    x, labels = (digits.data / 16).astype(np.float32), digits.target.astype(np.int64)  # pixels are 0 … 16
    out = held_out([f"#{i}" for i in range(len(x))], config.eval_fraction)
    return Data(
        train=LabelledVectors(x[~out], labels[~out]),
        eval=LabelledVectors(x[out], labels[out]),
        collate=collate_vectors,
        classes=tuple(map(str, digits.target_names)),
    )
