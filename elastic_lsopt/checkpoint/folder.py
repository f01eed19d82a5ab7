"""A folder of checkpoints: what is complete, what is damaged, how a new one takes its place, which old ones go.

    checkpoint-20/rank-0.safetensors, rank-1.safetensors, …     the tensors, a file a rank
    checkpoint-20/contents.json                                 where each chunk lies, and everything that is no tensor
    checkpoint-20/manifest.json                                 size and checksum of every other file; written last
    .tmp-checkpoint-30.2/                                       being written, by generation 2 of an elastic job: never
                                                                read, deleted by the next job or generation

A checkpoint gets its name by one rename after all its bytes are on disk, so a crash at any point leaves the last one.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from elastic_lsopt.checkpoint.safetensors_file import FileRecord

log = logging.getLogger("elastic_lsopt")
MANIFEST, CONTENTS = "manifest.json", "contents.json"
_NAME = re.compile(r"checkpoint-(\d+)")
_STAGED, _ASIDE, _BAD = ".tmp-", ".old-", "diverged-"


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / f"checkpoint-{step}"


def step_of(path: Path) -> int:
    """The step in a checkpoint's name; -1 for any other name."""
    found = _NAME.fullmatch(path.name)
    return int(found[1]) if found else -1


def listing(folder: Path) -> list[Path]:
    """The checkpoints of a folder by name, newest first, damaged ones included."""
    if not folder.is_dir():
        return []
    return sorted((p for p in folder.iterdir() if step_of(p) >= 0), key=step_of, reverse=True)


def latest(folder: str | Path) -> Path | None:
    """The newest intact checkpoint of a folder; a damaged one is skipped with a warning that names file and reason.

    Reads every byte of it once, for the checksums. None where there is none.
    """
    for path in listing(Path(folder)):
        if (reason := damage(path)) is None:
            return path
        warn_skipped(path, reason)
    return None


def warn_skipped(path: Path, reason: str) -> None:
    log.warning("skipped %s, which is damaged: %s", path.name, reason)


def damage(path: Path, rank: int = 0, world: int = 1) -> str | None:
    """What is wrong with a checkpoint, in one line; None if it is intact.

    Of `world` callers each reads its share of the files; together they have read all.
    """
    try:
        files = {
            str(name): (int(f["bytes"]), str(f["blake2b"])) for name, f in read_json(path / MANIFEST)["files"].items()
        }
    except FileNotFoundError:
        return f"{path / MANIFEST} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{path / MANIFEST} is unreadable ({type(error).__name__})"
    if CONTENTS not in files:
        return f"{path / MANIFEST} does not list {CONTENTS}"
    for name, (size, checksum) in sorted(files.items())[rank::world]:
        file = path / name
        if Path(name).name != name:  # a manifest is only data: it must not lead out of its folder
            return f"{path / MANIFEST} lists {name!r}, which is no plain file name"
        try:
            if (found := file.stat().st_size) != size:
                return f"{file} has {found} bytes instead of {size}"
            with file.open("rb") as data:
                if hashlib.file_digest(data, "blake2b").hexdigest() != checksum:
                    return f"{file} does not match its checksum"
        except OSError as error:
            return f"{file} cannot be read ({error.strerror})"
    return None


# -- writing ---------------------------------------------------------------------------------------------------------


def staging(path: Path, writer: int = 0) -> Path:
    """Where a checkpoint is written before it has its name: beside it, so that the rename is one.

    `writer` sets apart those that write the same step: an outdated one may not know yet that it is.
    """
    return path.parent / f"{_STAGED}{path.name}.{writer}"


def write_json(path: Path, value: Any) -> FileRecord:
    """Write JSON, on disk when this returns."""
    text = json.dumps(value, separators=(",", ":")).encode()
    with path.open("wb") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())
    return FileRecord(path.name, len(text), hashlib.blake2b(text).hexdigest())


def read_json(path: Path) -> Any:
    return json.loads(path.read_bytes())


def commit(path: Path, files: Iterable[FileRecord], writer: int = 0) -> None:
    """Write the manifest into the staged folder and give the folder its name, in place of one that had it before.

    Raises OSError where a file is not there in full: ranks that do not share a file system cannot save together.
    """
    staged = staging(path, writer)
    table = {f.name: {k: v for k, v in asdict(f).items() if k != "name"} for f in files}
    for name, metadata in table.items():
        file = staged / name
        if not file.is_file() or file.stat().st_size != metadata["bytes"]:
            raise OSError(
                f"{file} is not there in full as rank 0 sees it; "
                "the folder must lie on a file system that all nodes share"
            )
    write_json(staged / MANIFEST, {"files": table})
    sync(staged)
    rename(staged, path)


def aside_of(path: Path) -> Path:
    """Where a folder waits while its successor takes its name."""
    return path.parent / f"{_ASIDE}{path.name}"


def rename(staged: Path, path: Path) -> None:
    """Give a finished folder its name; at every moment the old or the new one can be found (see `clean`)."""
    aside = aside_of(path)
    if path.exists():
        path.rename(aside)
    staged.rename(path)
    sync(path.parent)
    shutil.rmtree(aside, ignore_errors=True)


def sync(folder: Path) -> None:
    """Bring a folder's own entries to disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def clean(folder: Path) -> None:
    """Delete what a job that ended in the middle of a save has left, and undo a replacement that it had half done."""
    for left in [p for p in folder.glob(".*") if p.name.startswith((f"{_STAGED}checkpoint-", f"{_ASIDE}checkpoint-"))]:
        named = folder / left.name[len(_ASIDE) :]
        if left.name.startswith(_ASIDE) and not named.exists():
            left.rename(named)
        else:
            shutil.rmtree(left, ignore_errors=True)


def set_aside(path: Path) -> Path:
    """Give a checkpoint a name by which nobody resumes from it, in place of one that had it before; its new path."""
    bad = path.parent / f"{_BAD}{path.name}"
    shutil.rmtree(bad, ignore_errors=True)
    return path.rename(bad)


def retain(folder: Path, committed: Path, limit: int | None) -> None:
    """Delete all but `limit` checkpoints: never the one just committed, first those beyond its step (a branch left)."""
    if limit is None:
        return
    step = step_of(committed)
    newest_first = sorted(listing(folder), key=lambda p: (step_of(p) <= step, step_of(p)), reverse=True)
    for path in newest_first[max(limit, 1) :]:
        try:
            doomed = path.rename(staging(path))  # half a deletion must not look like a checkpoint
            shutil.rmtree(doomed)
        except OSError as error:
            log.warning("could not delete the old %s: %s", path.name, error.strerror)
