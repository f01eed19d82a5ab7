"""Records from where data lies, one after the other: never more in memory than one of them, or one block of a file.

python-stdlib     the source text of the running Python's standard library
FILE              .jsonl and .parquet: a record a document; any other text: sections of 16 KiB, cut at line ends
FOLDER            each .txt, .md and .py file a document, each record of a .jsonl or .parquet file a document
FOLDER of HF      what `Dataset.save_to_disk` wrote; of a DatasetDict the `train` split
NAME              the `train` split of `datasets.load_dataset(NAME)`
"""

from __future__ import annotations

import json
import os
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from elastic_lsopt.config.settings import SettingError
from elastic_lsopt.training.building.hub import local_only
from elastic_lsopt.training.datasets.bad_records import BadRecords

STDLIB = "python-stdlib"
# Not the library's own code: tests, two programs that ship with it, tables that a program wrote, other packages.
_NOT_SOURCE = frozenset(
    {"test", "tests", "idlelib", "lib2to3", "pydoc_data", "encodings", "site-packages", "dist-packages"}
)
_TEXT, _RECORDS = (".txt", ".md", ".py"), (".jsonl", ".parquet")
SECTION_BYTES = 16 * 1024
"""A file alone is cut into sections, or nothing could be held out of it."""
PIECE_BYTES = 16 * 1024 * 1024
"""A file of a folder is one document; a larger one is read in pieces of this."""
LONGEST_LINE_BYTES = 1024 * 1024
"""A text without line ends is cut here."""
ROWS_AT_ONCE = 256


@dataclass(frozen=True)
class Record:
    """`name` is stable from run to run, and decides whether the record is held out; `place` is what a person is told.

    Plain text has `text`, and `ends` is False inside a file that was cut; of other records `fields` has the values and
    `known` the names of all columns. `classes` are the names of a field's numbers, where the source declares them.
    """

    name: str
    place: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    text: bytes | None = None
    ends: bool = True
    known: Sequence[str] = ()
    classes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Source:
    """Where the records of `key: name` lie: `files`, by their names inside of it, or a `table` of datasets."""

    key: str
    name: str
    files: Sequence[tuple[str, Path]] = ()
    table: Any = None

    @classmethod
    def of(cls, name: str, key: str = "dataset") -> Source:
        """Raises SettingError for a source that is missing, broken or of no kind that is known."""
        path = Path(name).expanduser()
        if name == STDLIB:
            return cls(key, name, stdlib_files())
        if path.suffix == ".json" and path.is_file():
            raise SettingError(
                key, f"{key}={name!r} is one JSON text; give .jsonl, a record a line (jq -c '.[]' FILE.json).",
            )  # fmt: skip
        if path.is_file():
            return cls(key, name, [(path.name, path)])
        if any((path / mark).is_file() for mark in ("dataset_dict.json", "dataset_info.json")):
            return cls(key, name, table=_on_disk(key, path))
        if not path.is_dir():
            return cls(key, name, table=_by_name(key, name))
        kinds = (*_TEXT, *_RECORDS)
        files = sorted((f.relative_to(path).as_posix(), f) for f in path.rglob("*") if f.suffix in kinds)
        if not files:
            raise SettingError(key, f"{key}={name!r} holds no {', '.join(kinds)} file.")
        return cls(key, name, files)

    def records(self, bad: BadRecords, wanted: frozenset[str] | None = None) -> Iterator[Record]:
        """All records in a fixed order; those that cannot be read go to `bad`. Of columns only the `wanted` are read,
        where the format can pass over others."""
        if self.table is not None:
            yield from _rows(self.key, self.name, self.table, wanted)
        for name, file in self.files:
            try:
                if file.suffix == ".jsonl":
                    yield from _lines(self.key, name, file, bad)
                elif file.suffix == ".parquet":
                    yield from _parquet(self.key, name, file, wanted)
                else:
                    yield from _text(name, file, alone=len(self.files) == 1)
            except OSError as error:
                raise SettingError(self.key, f"{file} cannot be read: {error.strerror or error}.") from None

    def state(self) -> list[tuple[str, int, int, str]]:
        """(name, bytes, time of change in ns, path) of every file. Raises SettingError for one that is gone."""
        files = self.files
        if self.table is not None:
            files = [(Path(entry["filename"]).name, Path(entry["filename"])) for entry in self.table.cache_files]
        try:
            return [(name, f.stat().st_size, f.stat().st_mtime_ns, str(f)) for name, f in files]
        except OSError as error:
            raise SettingError(self.key, f"{error.filename} cannot be read: {error.strerror}.") from None

    @property
    def revision(self) -> str:
        """What `datasets` calls a table's content; "" for files."""
        return "" if self.table is None else f"{len(self.table)} rows, {getattr(self.table, '_fingerprint', self.name)}"


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


def _text(name: str, file: Path, *, alone: bool) -> Iterator[Record]:
    """A file's text. Sections have names of their own, pieces of a large document keep its name: they stay together."""
    size, start = file.stat().st_size, 0
    for piece in _pieces(file, SECTION_BYTES if alone else PIECE_BYTES):
        stop = start + len(piece)
        yield Record(f"{name}@{start}" if alone else name, str(file), text=piece, ends=stop >= size)
        start = stop


def _pieces(file: Path, size: int) -> Iterator[bytes]:
    """The file's bytes in pieces of `size` and the rest of a line."""
    with file.open("rb") as lines:
        while piece := lines.read(size):
            piece += lines.readline(LONGEST_LINE_BYTES)
            if not piece.endswith(b"\n"):
                piece += lines.read(_rest_of_letter(piece))
            yield piece


def _rest_of_letter(text: bytes) -> int:
    """How many bytes the last letter of a UTF-8 text lacks."""
    for back in range(1, min(4, len(text)) + 1):
        byte = text[-back]
        if byte >= 0xC0:
            length = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return max(0, length - back)
        if byte < 0x80:
            break
    return 0


def _lines(key: str, name: str, file: Path, bad: BadRecords) -> Iterator[Record]:
    with file.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            place = f"{file}:{number}"
            if line.strip():
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError) as error:
                    bad.add(SettingError(key, f"{place}: not JSON ({error})."))
                    continue
                if not isinstance(record, dict):
                    bad.add(SettingError(key, f"{place}: a record must be an object, {{...}}."))
                    continue
                yield Record(f"{name}#{number}", place, record, known=list(record))


def _parquet(key: str, name: str, file: Path, wanted: frozenset[str] | None) -> Iterator[Record]:
    from pyarrow import ArrowException, parquet

    number = 0
    try:
        table = parquet.ParquetFile(file, pre_buffer=False)
        known = list(table.schema_arrow.names)
        for batch in table.iter_batches(ROWS_AT_ONCE, columns=_chosen(known, wanted)):
            for row in batch.to_pylist():
                yield Record(f"{name}#{number}", f"{file}, row {number}", row, known=known)
                number += 1
    except ArrowException as error:
        reason = " ".join(str(error).split())[:200]
        raise SettingError(key, f"{file} is no parquet file that can be read, from row {number} on: {reason}") from None


def _rows(key: str, source: str, table: Any, wanted: frozenset[str] | None) -> Iterator[Record]:
    known = list(table.column_names)
    table = table.select_columns(_chosen(known, wanted) or known[:1])  # without any it would have no row
    named = {n: tuple(f.names) for n, f in table.features.items() if getattr(f, "names", None)}  # a ClassLabel's
    for number, row in enumerate(table):
        yield Record(f"#{number}", f"{key}={source!r}, row {number}", row, known=known, classes=named)


def _chosen(known: list[str], wanted: frozenset[str] | None) -> list[str]:
    return [name for name in known if wanted is None or name in wanted]


def _on_disk(key: str, path: Path) -> Any:
    from datasets import load_from_disk  # pyright: ignore[reportAttributeAccessIssue]

    try:
        table = load_from_disk(str(path), keep_in_memory=False)
    except Exception as error:  # pyarrow, json and OS errors, by what is broken
        raise SettingError(key, f"{key}={str(path)!r} is broken: {error}".splitlines()[0]) from None
    return _train_split(key, str(path), table)


def _by_name(key: str, source: str) -> Any:
    """A name that `datasets` knows; what looks like a path is missing, and asks nobody."""
    if Path(source).suffix in (*_TEXT, *_RECORDS, ".json") or source[0] in "./~" or source.count("/") > 1:
        raise SettingError(key, f"{key}={source!r} does not exist; give a file, a folder or {STDLIB!r}.")
    local_only(key, source, "datasets")
    from datasets import load_dataset  # pyright: ignore[reportAttributeAccessIssue]

    try:
        return _train_split(key, source, load_dataset(source))
    except SettingError:
        raise
    except Exception as error:  # not found, no network, a broken cache
        line = (str(error) or type(error).__name__).splitlines()[0]
        raise SettingError(
            key, f"{key}={source!r} is no file, no folder and no dataset that can be loaded ({line})."
        ) from None


def _train_split(key: str, source: str, table: Any) -> Any:
    if not isinstance(table, Mapping):
        return table
    if "train" not in table:
        raise SettingError(key, f"{key}={source!r} has no train split, only {', '.join(map(str, table))}.")
    return table["train"]
