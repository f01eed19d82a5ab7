"""The folder of an export among a user's other files: only what our own manifest lists is ever replaced.

`export_manifest.json` lists, by their path in the folder, the files that an export has written. The next export gives
the folder its new content by a rename, as a checkpoint does; then whatever the manifest before did not list moves from
the old folder into the new one, and only what it did list is deleted.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from errno import EEXIST
from pathlib import Path, PurePosixPath

from elastic_lsopt.checkpoint.folder import aside_of, read_json, sync, write_json

EXPORTED = "export_manifest.json"
SHOWN = 3
"""Names in a message, at most."""


def refusal(folder: Path) -> str | None:
    """Why no export may go to this folder, None where one may: it is absent, empty, or holds an earlier export."""
    if not folder.exists():
        return None
    if not folder.is_dir():
        return "it is a file; give a folder"
    there = sorted(path.name for path in folder.iterdir())
    if not there or _listed(folder) is not None:
        return None
    more = ", …" if len(there) > SHOWN else ""
    return (
        f"it holds {', '.join(there[:SHOWN])}{more} and no {EXPORTED} of an earlier export; give a new folder, or move "
        "away what is there"
    )


def publish(staged: Path, folder: Path) -> None:
    """Give the staged export its name; what an earlier export has written goes, everything else stays.

    Raises FileExistsError, before anything has changed, where a file of this export has the name of one that no
    export has written. Where this process dies in between, the next call ends what it began.
    """
    _end_replacement(folder)
    new = sorted(_entries(staged))
    taken = {*new, EXPORTED}.intersection(_foreign(folder))
    if taken:
        raise FileExistsError(
            EEXIST, "no export has written it, and this one would replace it", str(folder / min(taken))
        )
    write_json(staged / EXPORTED, {"files": [*new, EXPORTED]})
    sync(staged)
    if folder.exists():
        folder.rename(aside_of(folder))
    staged.rename(folder)
    sync(folder.parent)
    _end_replacement(folder)


def _end_replacement(folder: Path) -> None:
    """Move what no export has written from the folder set aside into its successor, and delete the rest."""
    aside = aside_of(folder)
    if not aside.exists():
        return
    if not folder.exists():
        aside.rename(folder)
        return
    for name in _foreign(aside):
        target = folder / name
        if not target.exists():  # else both stay
            target.parent.mkdir(parents=True, exist_ok=True)
            (aside / name).rename(target)
    for name in _listed(aside) or ():
        (aside / name).unlink(missing_ok=True)
    with suppress(OSError):  # not empty: see above
        for path in sorted((p for p in aside.rglob("*") if p.is_dir()), reverse=True):
            path.rmdir()
        aside.rmdir()
    sync(folder)


def _listed(folder: Path) -> list[str] | None:
    """The files that the export in this folder has written; None where there is no readable manifest of one."""
    try:
        names = read_json(folder / EXPORTED)["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    # A manifest is only data: it must not lead out of its folder.
    if not isinstance(names, list) or not all(isinstance(n, str) and _inside(n) for n in names):
        return None
    return names


def _inside(name: str) -> bool:
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts


def _foreign(folder: Path) -> list[str]:
    """What is in the folder, or in none, and was written by no export."""
    ours = _listed(folder) or ()
    return [name for name in _entries(folder) if name not in ours]


def _entries(folder: Path) -> Iterator[str]:
    """Files and empty folders below a folder, by their path in it."""
    for path in folder.rglob("*"):
        if path.is_symlink() or not path.is_dir() or not any(path.iterdir()):
            yield path.relative_to(folder).as_posix()
