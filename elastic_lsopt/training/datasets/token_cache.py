"""Encoded corpora on disk: written once, by one process of a host, and mapped into the memory of all that use them.

    dataset_cache_dir/
      <key>.lock                 held by whoever writes; the others wait, and then find what it has written
      <key>.unfinished/          what a writer that was killed has left, until the next one takes it away
      <key>/
        training.tokens …        the arrays of `encoded.py`, without headers
        facts.json               their types and sizes, and what is known of the corpus

A key is made of what was read (names, sizes, times of change, and the bytes at both ends of each file), of the
tokenizer's content and of the settings that say what becomes of a record. An entry is never changed; it may be deleted
when no job uses it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from elastic_lsopt.config.settings import SettingError
from elastic_lsopt.training.datasets.encoded import Encoded, EncodedPart, Files, Memory, TooLarge, mapped
from elastic_lsopt.training.datasets.records import Source

FORMAT = 1
"""Raised where the same settings give other arrays than they did."""
IN_MEMORY_BYTES = 64 << 20
"""Of a corpus that is not written to disk, unless a folder for it is named."""
ENDS_BYTES = 64 << 10
FACTS = "facts.json"
_PARTS = ("training", "held_out")

Encode = Callable[[Callable[[str], Any]], Encoded]
"""Encode a corpus into columns: of each part's name it is given who makes that part's columns."""


def cached(folder: str | None, key: str, encode: Encode) -> Encoded:
    """What `encode` makes, from the cache where it is there already.

    Without a folder a corpus of at most 64 MiB stays in memory and nothing is written; a larger one goes to the folder
    of Hugging Face's cache. Raises SettingError, one line, for a disk that is full or read-only.
    """
    home = Path(folder).expanduser() if folder is not None else _default_folder()
    if (found := _find(home / key)) is not None:
        return found
    if folder is None:
        try:
            memory = Memory(IN_MEMORY_BYTES)
            return encode(lambda part: memory.column)
        except TooLarge:
            pass
    try:
        with _locked(home, key):
            return _find(home / key) or _written(home, key, encode)
    except OSError as error:
        said = f"dataset_cache_dir={home} cannot be written: {error.strerror or error}"
        raise SettingError(
            "dataset_cache_dir", f"{said}; it takes the tokens of the whole corpus: give a folder on a disk with room."
        ) from None


def key_of(source: Source, tokenizer: str, settings: dict[str, Any]) -> str:
    """The name of an entry: 32 hexadecimal digits. Reads at most 128 KiB of each file."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(json.dumps([FORMAT, tokenizer, settings, source.revision], sort_keys=True).encode())
    for name, size, changed_ns, path in source.state():
        digest.update(f"\n{name} {size} {changed_ns} ".encode())
        with open(path, "rb") as file:
            digest.update(file.read(ENDS_BYTES))
            if size > ENDS_BYTES:
                file.seek(max(ENDS_BYTES, size - ENDS_BYTES))
                digest.update(file.read(ENDS_BYTES))
    return digest.hexdigest()


def _default_folder() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HOME) / "elastic_lsopt"


def _find(entry: Path) -> Encoded | None:
    """A whole entry, or None."""
    try:
        facts = json.loads((entry / FACTS).read_text(encoding="utf-8"))
        parts = []
        for part in _PARTS:
            kept = facts["arrays"][part]
            arrays = {name: mapped(entry / f"{part}.{name}", kind) for name, (kind, _) in kept["columns"].items()}
            if any(len(arrays[name]) != length for name, (_, length) in kept["columns"].items()):
                return None
            parts.append(EncodedPart(arrays, kept["digest"]))
        training, held_out = parts
        return Encoded(training, held_out, facts["facts"])
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        return None


def _written(home: Path, key: str, encode: Encode) -> Encoded:
    """Write an entry, and give it its name when it is whole."""
    unfinished, entry = home / f"{key}.unfinished", home / key
    for old in (unfinished, entry):
        shutil.rmtree(old, ignore_errors=True)
    try:
        unfinished.mkdir()
        files = Files(unfinished)
        made = encode(lambda part: lambda name, dtype: files.column(f"{part}.{name}", dtype))
        facts = {"arrays": {part: _described(getattr(made, part)) for part in _PARTS}, "facts": made.facts}
        (unfinished / FACTS).write_text(json.dumps(facts), encoding="utf-8")
        for file in unfinished.iterdir():
            _to_disk(file)
        os.rename(unfinished, entry)
        _to_disk(home)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    found = _find(entry)
    assert found is not None
    return found


def _described(part: EncodedPart) -> dict[str, Any]:
    columns = {name: (np.dtype(a.dtype).str, len(a)) for name, a in part.arrays.items()}
    return {"columns": columns, "digest": part.digest}


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _locked(home: Path, key: str) -> Iterator[None]:
    """Alone on this host, and on others that share the folder; the kernel lets go of a lock whose process has died."""
    home.mkdir(parents=True, exist_ok=True)
    with (home / f"{key}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
