"""What a job trains and evaluates on: two map-style datasets, and the function that makes a batch of samples.

    task                       sample                              batch of b samples
    causal_lm                  block_size tokens, packed           input_ids, labels [b, block_size] int64
    sequence_classification    a text's tokens and its class       input_ids, attention_mask [b, longest], labels [b]
    classification (digits)    64 numbers in 0 … 1 and a class     x [b, 64] fp32, labels [b] int64

Deterministic: the same files and settings give the same samples on every rank. Each rank holds all tokens in host
memory (2 bytes a token up to 65,536 ids, else 4); a corpus larger than that is not supported yet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from elastic_lsopt.config.settings import SettingError, TrainConfig
from elastic_lsopt.elastic.worker.same_data import Identity, digest_of
from elastic_lsopt.training.building.models import class_names
from elastic_lsopt.training.datasets.corpus import Document, bigram_entropy, documents, held_out
from elastic_lsopt.training.datasets.tokens import Tokens, tokens_of

Batch = dict[str, Tensor]


class Samples(Protocol):
    """Samples by number."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Any: ...

    @property
    def arrays(self) -> tuple[NDArray[Any], ...]:
        """All content."""
        ...


@dataclass(frozen=True, kw_only=True)
class Data:
    """`eval` has length 0 where eval_fraction is 0; `collate` is a pure function of the samples it is given."""

    train: Samples
    eval: Samples
    collate: Callable[[list[Any]], Batch]
    tokens: Tokens | None = None
    """The vocabulary of text; None for numbers."""
    classes: tuple[str, ...] = ()
    """Names of the classes, by label; empty for causal_lm."""
    labels_are_names: bool = False
    """Whether the source names the classes, so that the model's config should; else `classes` are the numbers."""
    bigram_entropy: float | None = None
    """causal_lm: H(next byte | byte) of the whole corpus, in nats a byte."""
    bytes_per_token: float | None = None
    """causal_lm: of the whole corpus; a loss in nats a token, divided by this, is in nats a byte."""

    @property
    def vocabulary_size(self) -> int | None:
        """Ids of the vocabulary; None for numbers."""
        return self.tokens.size if self.tokens else None

    @cached_property
    def identity(self) -> Identity:
        """What must be the same on all ranks: lengths, and digests of all content; about 1 s/GB, once."""
        parts = (("training", self.train), ("held-out", self.eval))
        sizes = {f"{name} samples": len(samples) for name, samples in parts}
        digests = {f"digest of the {name} part": digest_of(*samples.arrays) for name, samples in parts}
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


class TokenBlocks:
    """Consecutive, disjoint blocks of `block_size` tokens; what is left at the end, less than a block, is unused."""

    def __init__(self, tokens: NDArray[Any], block_size: int) -> None:
        self.blocks = tokens[: len(tokens) // block_size * block_size].reshape(-1, block_size)

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> NDArray[Any]:
        return self.blocks[index]

    @property
    def arrays(self) -> tuple[NDArray[Any], ...]:
        return (self.blocks,)


class LabelledTexts:
    """Texts of different lengths in one array of tokens, and their classes."""

    def __init__(self, texts: Sequence[NDArray[Any]], labels: Sequence[int]) -> None:
        self.tokens = np.concatenate([*texts]) if texts else np.zeros(0, np.uint16)
        self.ends = np.cumsum([0, *map(len, texts)])
        self.labels = np.asarray(labels, np.int64)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[NDArray[Any], int]:
        return self.tokens[self.ends[index] : self.ends[index + 1]], int(self.labels[index])

    @property
    def arrays(self) -> tuple[NDArray[Any], ...]:
        return self.tokens, self.ends, self.labels


class LabelledVectors:
    """Rows of numbers and their classes."""

    def __init__(self, x: NDArray[np.float32], labels: NDArray[np.int64]) -> None:
        self.x, self.labels = x, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[NDArray[np.float32], int]:
        return self.x[index], int(self.labels[index])

    @property
    def arrays(self) -> tuple[NDArray[Any], ...]:
        return self.x, self.labels


def collate_blocks(blocks: list[NDArray[Any]]) -> Batch:
    """Labels are the inputs: the loss compares position i with the input at i + 1."""
    ids = torch.from_numpy(np.stack(blocks).astype(np.int64))
    return {"input_ids": ids, "labels": ids.clone()}


def collate_texts(rows: list[tuple[NDArray[Any], int]], padding: int) -> Batch:
    """Texts padded on the right to the longest of the micro-batch, never to that of a rank: any world pads alike."""
    longest = max(len(text) for text, _ in rows)
    ids = np.full((len(rows), longest), padding, np.int64)
    mask = np.zeros((len(rows), longest), np.int64)
    for row, (text, _) in enumerate(rows):
        ids[row, : len(text)], mask[row, : len(text)] = text, 1
    labels = torch.tensor([label for _, label in rows])
    return {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask), "labels": labels}


def collate_vectors(rows: list[tuple[NDArray[np.float32], int]]) -> Batch:
    """Rows on top of each other."""
    return {
        "x": torch.from_numpy(np.stack([x for x, _ in rows])),
        "labels": torch.tensor([label for _, label in rows]),
    }


def _causal_lm(config: TrainConfig, tokens: Tokens) -> Data:
    def texts() -> Iterator[Document]:  # read twice, so that the texts are never in memory together
        return documents(config.dataset, text_field=config.dataset_text_field)

    names, pieces, size = [], [], 0
    for document in texts():
        ids = tokens.encode(document.text)
        if document.ends and tokens.end is not None:
            ids = np.append(ids, ids.dtype.type(tokens.end))
        names.append(document.name)
        pieces.append(ids)
        size += len(document.text)
    out = held_out(names, config.eval_fraction)
    parts = []
    for part, chosen in (("training", ~out), ("held-out", out)):
        kept = [ids for ids, take in zip(pieces, chosen, strict=True) if take]
        blocks = TokenBlocks(np.concatenate(kept) if kept else np.zeros(0, np.uint16), config.block_size)
        if kept and not len(blocks):
            raise SettingError(
                "block_size",
                f"the {part} part of dataset={config.dataset!r} has {sum(map(len, kept))} tokens, fewer than "
                f"block_size={config.block_size}; lower block_size, give more text, or change eval_fraction.",
            )
        parts.append(blocks)
    return Data(
        train=parts[0],
        eval=parts[1],
        collate=collate_blocks,
        tokens=tokens,
        bigram_entropy=bigram_entropy(document.text for document in texts()),
        bytes_per_token=size / sum(map(len, pieces)),
    )


def _sequence_classification(config: TrainConfig, tokens: Tokens) -> Data:
    if tokens.padding is None:
        raise SettingError(
            "tokenizer_name_or_path",
            f"the tokenizer {config.tokenizer_name_or_path or config.model_name_or_path!r} has neither a padding nor "
            "an end token, and texts of a batch must be padded; set its pad_token and save it again.",
        )
    names, texts, given, declared = [], [], [], ()
    for document in documents(
        config.dataset, text_field=config.dataset_text_field, label_field=config.dataset_label_field
    ):
        names.append(document.name)
        texts.append(tokens.encode_whole(document.text, config.block_size))
        given.append(document.label)
        declared = document.classes
    if declared and all(isinstance(label, int) and 0 <= label < len(declared) for label in given):
        given = [declared[label] for label in given]
    classes, labels = _classes(given, config.dataset_label_field, class_names(config), declared)
    out = held_out(names, config.eval_fraction)
    train, evaluation = (
        LabelledTexts([texts[i] for i in chosen], [labels[i] for i in chosen])
        for chosen in (np.flatnonzero(~out), np.flatnonzero(out))
    )
    collate = partial(collate_texts, padding=tokens.padding)
    return Data(
        train=train, eval=evaluation, collate=collate, tokens=tokens, classes=classes,
        labels_are_names=isinstance(given[0], str),
    )  # fmt: skip


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
