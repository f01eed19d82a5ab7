"""The file system of an output_dir: what checkpoints and the owner of a run folder need of it."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from elastic_lsopt.cli.doctor.finding import Finding, fail, ok, warn

LEAST_FREE = 2**30
SLOW_S = 1.0
BLOCK = 4 * 2**20


def look_at_files(folder: Path) -> Iterator[Finding]:
    """Write, flush to the disk, rename over another and create exclusively, in a folder of its own that it removes."""
    parent = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    what = f"files in {parent}"
    try:
        with tempfile.TemporaryDirectory(prefix="elastic-lsopt-doctor-", dir=parent) as own:
            spent_s = _exercise(Path(own))
    except OSError as error:
        yield fail(what, f"{error.strerror or error}", "choose another output_dir, or make it writable")
        return
    except _Wrong as wrong:
        yield fail(what, str(wrong), "choose a file system that keeps these promises (not an object store's mount)")
        return
    found = f"written, flushed, renamed; 4 MiB to the disk in {spent_s:.2f} s"
    yield ok(what, found) if spent_s < SLOW_S else warn(what, found, "checkpoints will be slow: choose a faster disk")
    free = shutil.disk_usage(parent).free
    said = f"{free / 2**30:,.1f} GiB"
    yield ok("free space", said) if free >= LEAST_FREE else warn("free space", said, "make room: checkpoints need it")


class _Wrong(Exception):
    """A file system that does not do what it says."""


def _exercise(own: Path) -> float:
    begin = time.monotonic()
    with (own / "new").open("wb") as out:
        out.write(os.urandom(BLOCK))
        out.flush()
        os.fsync(out.fileno())
    spent_s = time.monotonic() - begin
    (own / "old").write_bytes(b"old")
    os.replace(own / "new", own / "old")
    if (own / "old").stat().st_size != BLOCK or (own / "new").exists():
        raise _Wrong("a rename over another file did not replace it")
    folder = os.open(own, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
    os.close(os.open(own / "claim", os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    try:
        os.close(os.open(own / "claim", os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        return spent_s
    raise _Wrong("two processes could create the same file: a run folder would have two owners")
