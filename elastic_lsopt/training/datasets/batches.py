"""Samples by number, and the functions that make a batch of them.

    samples          a sample                           batch of b samples
    TokenBlocks      block_size tokens                  input_ids, labels [b, block_size] int64
    Documents        a document                         input_ids, attention_mask, labels [b, longest]
    PackedDocuments  documents, block_size in all       input_ids, position_ids, labels [b, longest]
    LabelledTexts    a text's tokens and its class      input_ids, attention_mask [b, longest], labels [b]
    LabelledVectors  numbers and a class                x [b, numbers] fp32, labels [b] int64

A batch is padded on the right to the longest of the micro-batch, never to that of a rank: any world pads alike. The
loss compares position i with the label at i + 1, and -100 masks a label.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from elastic_lsopt.elastic.worker.same_data import digest_of
from elastic_lsopt.training.datasets.encoded import EncodedPart

Batch = dict[str, Tensor]
Collate = Callable[[list[Any]], Batch]
MASKED = -100


class Samples(Protocol):
    """Samples by number; the digest is of all their content."""

    @property
    def digest(self) -> str: ...
    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Any: ...


class TokenBlocks:
    """Consecutive, disjoint blocks of `block_size` tokens; what is left at the end, less than a block, is unused."""

    def __init__(self, tokens: NDArray[Any], block_size: int, digest: str | None = None) -> None:
        self.blocks = tokens[: len(tokens) // block_size * block_size].reshape(-1, block_size)
        self.digest = digest or digest_of(self.blocks)

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> NDArray[Any]:
        return self.blocks[index]


class Documents:
    """Documents of different lengths: (ids [n], labels [n]), a label masked where the token is not trained."""

    def __init__(self, part: EncodedPart) -> None:
        self.digest = part.digest
        self._tokens, self._ends, self._trained = part["tokens"], part["ends"], part.get("trained")

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        span = span_of(self._ends, index)
        ids = self._tokens[span].astype(np.int64)
        return ids, ids if self._trained is None else np.where(self._trained[span], ids, MASKED)


class PackedDocuments:
    """Rows of whole documents, at most block_size tokens each: the documents of a row, as `Documents` gives them."""

    def __init__(self, part: EncodedPart) -> None:
        self.digest = part.digest
        self._documents, self._order, self._rows = Documents(part), part["order"], part["rows"]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        return [self._documents[int(i)] for i in self._order[span_of(self._rows, index)]]


class LabelledTexts:
    """Texts of different lengths in one array of tokens, and their classes."""

    def __init__(self, part: EncodedPart, classes: Sequence[int]) -> None:
        self._tokens, self._ends = part["tokens"], part["ends"]
        self.labels = np.asarray(classes, np.int64)[part["labels"]] if len(classes) else np.zeros(0, np.int64)
        self.digest = f"{part.digest}-{digest_of(np.asarray(classes, np.int64))}"

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[NDArray[Any], int]:
        return self._tokens[span_of(self._ends, index)], int(self.labels[index])


class LabelledVectors:
    """Rows of numbers and their classes."""

    def __init__(self, x: NDArray[np.float32], labels: NDArray[np.int64]) -> None:
        self.x, self.labels, self.digest = x, labels, digest_of(x, labels)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[NDArray[np.float32], int]:
        return self.x[index], int(self.labels[index])


def span_of(ends: NDArray[np.int64], index: int) -> slice:
    """Where item `index` lies, of items that end at `ends`."""
    return slice(int(ends[index - 1]) if index else 0, int(ends[index]))


def collate_blocks(blocks: list[NDArray[Any]]) -> Batch:
    """Labels are the inputs."""
    ids = torch.from_numpy(np.stack(blocks).astype(np.int64))
    return {"input_ids": ids, "labels": ids.clone()}


def collate_documents(rows: list[tuple[NDArray[np.int64], NDArray[np.int64]]], padding: int) -> Batch:
    """A document a row."""
    ids, labels = ([row[i] for row in rows] for i in range(2))
    return {
        "input_ids": _padded(ids, padding),
        "attention_mask": _padded([np.ones_like(row) for row in ids], 0),
        "labels": _padded(labels, MASKED),
    }


def collate_packed(rows: list[list[tuple[NDArray[np.int64], NDArray[np.int64]]]], padding: int) -> Batch:
    """Several documents a row, whose positions begin at 0 each: by that the model's attention tells them apart.

    The first label of a document is masked, since the end of another does not predict it. Padding counts on from 0 as a
    document of its own does, and has no label.
    """
    ids = [np.concatenate([document for document, _ in row]) for row in rows]
    labels = [np.concatenate([np.r_[MASKED, label[1:]] for _, label in row]) for row in rows]
    longest = max(map(len, ids))
    positions = [
        np.concatenate([np.arange(n) for n in (*(len(d) for d, _ in row), longest - len(of_row))])
        for row, of_row in zip(rows, ids, strict=True)
    ]
    return {
        "input_ids": _padded(ids, padding),
        "position_ids": torch.from_numpy(np.stack(positions)),
        "labels": _padded(labels, MASKED),
    }


def collate_texts(rows: list[tuple[NDArray[Any], int]], padding: int) -> Batch:
    """A text a row, and the classes."""
    ids = [text.astype(np.int64) for text, _ in rows]
    mask = [np.ones_like(row) for row in ids]
    labels = torch.tensor([label for _, label in rows])
    return {"input_ids": _padded(ids, padding), "attention_mask": _padded(mask, 0), "labels": labels}


def collate_vectors(rows: list[tuple[NDArray[np.float32], int]]) -> Batch:
    """Rows on top of each other."""
    return {
        "x": torch.from_numpy(np.stack([x for x, _ in rows])),
        "labels": torch.tensor([label for _, label in rows]),
    }


def _padded(rows: Sequence[NDArray[np.int64]], value: int) -> Tensor:
    out = np.full((len(rows), max(map(len, rows))), value, np.int64)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return torch.from_numpy(out)
