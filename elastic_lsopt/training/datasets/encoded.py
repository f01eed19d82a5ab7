"""A corpus as numbers: flat arrays of all its documents, in memory or in files that are mapped into it.

tokens [n]               of all documents of a part, end to end
trained [n]              whether a token is a target of the loss (chat and completions)
ends [documents]         where each document ends in `tokens`
labels [documents]       the number of its class in `facts["labels"]`
order, rows              packed documents: their numbers row by row, and where each row ends in `order`
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

from elastic_lsopt.data.best_fit import best_fit

PACKED_AT_ONCE = 16_384
"""Documents among which rows are made; a row never holds one of these and one of the next."""
BUFFER_BYTES = 1 << 16


@dataclass(frozen=True)
class Document:
    """The token ids of a document or of a piece of it, [n]; which of them are trained on (None: all); its class."""

    ids: NDArray[Any]
    trained: NDArray[np.bool_] | None = None
    label: int | str | None = None


@dataclass(frozen=True)
class EncodedPart:
    """The arrays of one part by name, and a digest of their content."""

    arrays: Mapping[str, NDArray[Any]]
    digest: str

    def __getitem__(self, name: str) -> NDArray[Any]:
        return self.arrays[name]

    def get(self, name: str) -> NDArray[Any] | None:
        return self.arrays.get(name)


@dataclass(frozen=True)
class Encoded:
    """Both parts of a corpus, and what is known of the whole (JSON)."""

    training: EncodedPart
    held_out: EncodedPart
    facts: dict[str, Any] = field(default_factory=dict)


class Column(Protocol):
    """An array that grows."""

    def append(self, values: NDArray[Any]) -> None: ...
    def close(self) -> NDArray[Any]: ...


class TooLarge(Exception):
    """More bytes than were to be kept in memory."""


class Memory:
    """Columns in memory, together at most `limit_bytes`; raises TooLarge beyond."""

    def __init__(self, limit_bytes: int) -> None:
        self.left = limit_bytes

    def column(self, name: str, dtype: DTypeLike) -> Column:
        return _InMemory(self, dtype)


class _InMemory:
    def __init__(self, memory: Memory, dtype: DTypeLike) -> None:
        self._memory, self._pieces = memory, [np.zeros(0, dtype)]

    def append(self, values: NDArray[Any]) -> None:
        self._memory.left -= values.nbytes
        if self._memory.left < 0:
            raise TooLarge
        self._pieces.append(values)

    def close(self) -> NDArray[Any]:
        return np.concatenate(self._pieces)


class Files:
    """Columns in files of a folder, written through a buffer of 64 KiB each, and mapped when they are closed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def column(self, name: str, dtype: DTypeLike) -> Column:
        return _InFile(self.folder / name, dtype)


class _InFile:
    def __init__(self, path: Path, dtype: DTypeLike) -> None:
        self._path, self._dtype = path, np.dtype(dtype)
        self._file = path.open("wb", buffering=BUFFER_BYTES)

    def append(self, values: NDArray[Any]) -> None:
        self._file.write(np.ascontiguousarray(values).data)

    def close(self) -> NDArray[Any]:
        self._file.close()
        return mapped(self._path, self._dtype)


def mapped(path: Path, dtype: DTypeLike) -> NDArray[Any]:
    """The array of a file without a header, as pages that the kernel reads when they are looked at and may drop."""
    if not path.stat().st_size:
        return np.zeros(0, dtype)
    return np.memmap(path, dtype, mode="r").view(np.ndarray)


class PartWriter:
    """Documents, one after the other, into the columns of a part; with `row_tokens` it also packs them into rows.

    `columns` are those that the documents fill, by name, with their types; `tokens` is always among them.
    """

    def __init__(
        self,
        column: Callable[[str, DTypeLike], Column],
        columns: Mapping[str, DTypeLike],
        row_tokens: int | None = None,
    ) -> None:
        kinds = dict(columns) | ({"order": np.int64, "rows": np.int64} if row_tokens else {})
        self._columns = {name: column(name, dtype) for name, dtype in kinds.items()}
        self._dtypes = {name: np.dtype(dtype) for name, dtype in kinds.items()}
        self._digests = {name: hashlib.blake2b(digest_size=8) for name in kinds}
        self._row_tokens = row_tokens
        self._lengths: list[int] = []
        self._pending: dict[str, list[int]] = {name: [] for name in ("ends", "labels") if name in kinds}
        self.tokens = self.documents = self._packed_documents = self._packed_places = 0

    def append(self, document: Document, label: int = 0) -> None:
        """Add a document; `label` is the number of its class."""
        self._append("tokens", document.ids)
        if "trained" in self._columns:
            self._append("trained", np.ones(len(document.ids), bool) if document.trained is None else document.trained)
        self.tokens += len(document.ids)
        self.documents += 1
        for name, value in (("ends", self.tokens), ("labels", label)):
            if name in self._pending:
                self._pending[name].append(value)
        if self._row_tokens:
            self._lengths.append(len(document.ids))
        if self.documents % PACKED_AT_ONCE == 0:
            self._flush()

    def close(self) -> EncodedPart:
        """The part as it is read from now on."""
        self._flush()
        arrays = {name: column.close() for name, column in self._columns.items()}
        digest = hashlib.blake2b(digest_size=8)
        for name in sorted(arrays):
            digest.update(f"{name} {arrays[name].dtype} {len(arrays[name])} {self._digests[name].hexdigest()}".encode())
        return EncodedPart(arrays, digest.hexdigest())

    def _append(self, name: str, values: NDArray[Any]) -> None:
        values = np.ascontiguousarray(values, self._dtypes[name])
        self._digests[name].update(values.data)
        self._columns[name].append(values)

    def _flush(self) -> None:
        for name, values in self._pending.items():
            self._append(name, np.array(values, self._dtypes[name]))
            values.clear()
        if self._row_tokens and self._lengths:
            order, rows = best_fit(self._lengths, self._row_tokens)
            self._append("order", order + self._packed_documents)
            self._append("rows", rows + self._packed_places)
            self._packed_documents = self._packed_places = self.documents
            self._lengths.clear()
