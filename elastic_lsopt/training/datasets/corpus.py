"""Documents from where text lies, and which of them are held out.

    python-stdlib     the source text of the running Python's standard library
    FILE              .jsonl: a record a document; any other text: sections of 16 KiB, cut at line ends
    FOLDER            each .txt, .md and .py file a document, each record of a .jsonl file a document
    FOLDER of HF      what `Dataset.save_to_disk` wrote; of a DatasetDict the `train` split
    NAME              the `train` split of `datasets.load_dataset(NAME)`

A document is held out by a hash of its name, whole: it stays in its part when others join or leave the corpus.
"""

from __future__ import annotations

import json
import os
import sysconfig
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from elastic_lsopt.config.settings import SettingError
from elastic_lsopt.config.spelling import did_you_mean
from elastic_lsopt.training.building.hub import local_only

STDLIB = "python-stdlib"
# Not the library's own code: tests, two programs that ship with it, tables that a program wrote, other packages.
_NOT_SOURCE = frozenset(
    {"test", "tests", "idlelib", "lib2to3", "pydoc_data", "encodings", "site-packages", "dist-packages"}
)
_TEXT = (".txt", ".md", ".py")
_SECTION = 16 * 1024


@dataclass(frozen=True)
class Document:
    """`name` is stable from run to run; `label` is given for classification; `ends` is False inside a cut file.

    `classes` are the names of the source's numbers, by number, where it declares them.
    """

    name: str
    text: bytes
    label: int | str | None = None
    ends: bool = True
    classes: tuple[str, ...] = ()


def documents(source: str, *, text_field: str = "text", label_field: str | None = None) -> Iterator[Document]:
    """The documents of a source in a fixed order, empty texts left out; `label_field` asks for a label each.

    Raises SettingError for a source that is missing or holds no document, a broken record or a missing field.
    """
    empty = True
    for document in _read(source, text_field, label_field):
        if document.text:
            empty = False
            yield document
    if empty:
        raise SettingError("dataset", f"dataset={source!r} holds no text; give a source with at least one document.")


def held_out(names: list[str], fraction: float) -> NDArray[np.bool_]:
    """Which documents are kept from training: those whose hash, as a number in [0, 1), is below `fraction`.

    Where chance would leave a part without any document, the one with the nearest hash goes there.
    Raises SettingError where there is only one document to divide.
    """
    if fraction == 0:
        return np.zeros(len(names), bool)
    if len(names) < 2:
        raise SettingError(
            "eval_fraction",
            f"eval_fraction={fraction} of a dataset with one document leaves nothing to hold out or to train on; "
            "give at least 2 documents, or set eval_fraction: 0.",
        )
    hashes = np.array([int.from_bytes(blake2b(n.encode(), digest_size=6).digest()) for n in names]) / 2**48
    out = hashes < fraction
    if not out.any():
        out[hashes.argmin()] = True
    if out.all():
        out[hashes.argmax()] = False
    return out


def bigram_entropy(texts: Iterable[bytes]) -> float:
    """H(next byte | byte) of these texts in nats a byte, pairs counted within each text; nan without a pair.

    The best loss that a model of pairs of bytes can reach on them: a language model must end below it.
    """
    pairs = np.zeros(256 * 256, np.int64)
    for text in texts:
        codes = np.frombuffer(text, np.uint8).astype(np.int64)
        pairs += np.bincount(256 * codes[:-1] + codes[1:], minlength=256 * 256)
    table = pairs.reshape(256, 256)
    seen = table > 0
    share = table / np.maximum(table.sum(1, keepdims=True), 1)
    return float(-(table[seen] * np.log(share[seen])).sum() / table.sum()) if seen.any() else float("nan")


def stdlib_files() -> list[tuple[str, Path]]:
    """(name, path) of the standard library's source files that count as text, sorted by name."""
    root = Path(sysconfig.get_path("stdlib"))
    files = []
    for folder, below, names in os.walk(root):
        below[:] = [name for name in below if name not in _NOT_SOURCE]  # packages may be large: do not walk them
        files += [
            Path(folder, name) for name in names if name.endswith(".py") and not name.startswith("_sysconfigdata")
        ]
    return sorted((file.relative_to(root).as_posix(), file) for file in files)


def _read(source: str, text_field: str, label_field: str | None) -> Iterator[Document]:
    path = Path(source).expanduser()
    if source == STDLIB:
        files = stdlib_files()
    elif path.is_file():
        files = [(path.name, path)]
    elif any((path / mark).is_file() for mark in ("dataset_dict.json", "dataset_info.json")):
        yield from _rows(source, _on_disk(path), text_field, label_field)
        return
    elif path.is_dir():
        kinds = (*_TEXT, ".jsonl")
        files = sorted((f.relative_to(path).as_posix(), f) for f in path.rglob("*") if f.suffix in kinds)
        if not files:
            raise SettingError("dataset", f"dataset={source!r} holds no {', '.join(kinds)} file.")
    else:
        yield from _rows(source, _by_name(source), text_field, label_field)
        return

    for name, file in files:
        if file.suffix == ".jsonl":
            yield from _records(name, file, text_field, label_field)
        elif label_field is not None:
            raise SettingError("dataset", f"{file}: plain text has no labels; classification needs .jsonl records.")
        elif len(files) == 1:
            yield from _sections(name, file.read_bytes())
        else:
            yield Document(name, file.read_bytes())


def _sections(name: str, text: bytes) -> Iterator[Document]:
    """A file alone is cut, or nothing could be held out of it; no document ends at a cut."""
    start = 0
    while start < len(text):
        line_end = text.find(b"\n", start + _SECTION)
        stop = len(text) if line_end < 0 else line_end + 1
        yield Document(f"{name}@{start}", text[start:stop], ends=stop == len(text))
        start = stop


def _records(name: str, file: Path, text_field: str, label_field: str | None) -> Iterator[Document]:
    with file.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    record = json.loads(line)
                except ValueError as error:
                    raise SettingError("dataset", f"{file}:{number}: not JSON ({error}).") from None
                if not isinstance(record, dict):
                    raise SettingError("dataset", f"{file}:{number}: a record must be an object, {{...}}.")
                yield _document(f"{name}#{number}", f"{file}:{number}", record, text_field, label_field)


def _rows(source: str, table: Any, text_field: str, label_field: str | None) -> Iterator[Document]:
    feature = (getattr(table, "features", None) or {}).get(label_field)  # a ClassLabel knows its names
    classes = tuple(getattr(feature, "names", None) or ())
    for number, row in enumerate(table):
        document = _document(f"#{number}", f"dataset={source!r}, row {number}", row, text_field, label_field)
        yield replace(document, classes=classes)


def _document(name: str, place: str, record: Mapping[str, Any], text_field: str, label_field: str | None) -> Document:
    wanted = {"dataset_text_field": text_field} | ({"dataset_label_field": label_field} if label_field else {})
    for key, field in wanted.items():
        if field not in record:
            raise SettingError(key, f"{place}: no field {field!r} ({key}){did_you_mean(field, list(record))}")
    text, label = record[text_field], record[label_field] if label_field else None
    if not isinstance(text, str):
        raise SettingError("dataset_text_field", f"{place}: field {text_field!r} must be text, got {text!r:.40}.")
    if label_field and not isinstance(label, int | str):
        raise SettingError(
            "dataset_label_field",
            f"{place}: field {label_field!r} must be a class, an integer or a name; got {label!r:.40}.",
        )
    return Document(name, text.encode("utf-8", errors="replace"), label)


def _on_disk(path: Path) -> Any:
    from datasets import load_from_disk  # pyright: ignore[reportAttributeAccessIssue]

    try:
        table = load_from_disk(str(path))
    except Exception as error:  # pyarrow, json and OS errors, by what is broken
        raise SettingError("dataset", f"dataset={str(path)!r} is broken: {error}".splitlines()[0]) from None
    return _train_split(str(path), table)


def _by_name(source: str) -> Any:
    """A name that `datasets` knows; what looks like a path is missing, and asks nobody."""
    if Path(source).suffix in (*_TEXT, ".jsonl", ".json") or source[0] in "./~" or source.count("/") > 1:
        raise SettingError("dataset", f"dataset={source!r} does not exist; give a file, a folder or {STDLIB!r}.")
    local_only("dataset", source, "datasets")
    from datasets import load_dataset  # pyright: ignore[reportAttributeAccessIssue]

    try:
        return _train_split(source, load_dataset(source))
    except SettingError:
        raise
    except Exception as error:  # not found, no network, a broken cache
        line = (str(error) or type(error).__name__).splitlines()[0]
        raise SettingError(
            "dataset", f"dataset={source!r} is no file, no folder and no dataset that can be loaded ({line})."
        ) from None


def _train_split(source: str, table: Any) -> Any:
    if not isinstance(table, Mapping):
        return table
    if "train" not in table:
        raise SettingError("dataset", f"dataset={source!r} has no train split, only {', '.join(map(str, table))}.")
    return table["train"]
