"""What a node's agent leaves on disk: its votes, where it can be reached, and a name that no other agent has.

elastic/secret              the job's secret, where none was given
elastic/<node>.json         what this node has voted for and last knows (membership.Remembered)
elastic/<node>.address      where its store listens
elastic/<node>.events       all that came to it, where `elastic.event_log` asks for that
elastic/<node>.lock         held while the agent lives
"""

from __future__ import annotations

import fcntl
import json
import os
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import IO, Any

from elastic_lsopt.errors import UserError


class NodeFolder:
    """The files of one node in the run folder's `elastic/`; `name` is `wanted`, or wanted-2, -3 … beside living ones.

    A restarted agent gets its name, and with it its votes, back. Raises UserError where the folder cannot be written,
    or has no locks.
    """

    def __init__(self, run_folder: Path, wanted: str) -> None:
        self.path = run_folder / "elastic"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.name, self._lock = self._take_name(wanted)
        except OSError as error:
            raise UserError(f"{self.path} cannot be written: {error.strerror}; choose another output_dir.") from None

    def _take_name(self, wanted: str) -> tuple[str, IO[str]]:
        for n in count(1):
            name = wanted if n == 1 else f"{wanted}-{n}"
            lock = (self.path / f"{name}.lock").open("w")
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:  # a living agent's
                lock.close()
                continue
            except OSError as error:
                lock.close()
                raise UserError(
                    f"{lock.name} cannot be locked: {error.strerror}; two agents would take one name for theirs. Mount "
                    "that file system with locks (on Lustre: -o flock), or choose another output_dir."
                ) from None
            return name, lock
        raise AssertionError

    @property
    def events(self) -> Path:
        """Where this node's events are logged."""
        return self.path / f"{self.name}.events"

    def remember(self, value: dict[str, Any]) -> None:
        """On disk, whole, when this returns: a vote that was given must not be forgotten in a crash.

        Raises OSError where the disk is full or gone; what was there before stays.
        """
        path = self.path / f"{self.name}.json"
        draft = path.with_suffix(".draft")
        with draft.open("w", encoding="utf-8") as out:
            out.write(json.dumps(value))  # `json.dump` takes ten times as long
            out.flush()
            os.fsync(out.fileno())
        draft.replace(path)

    def remembered(self) -> dict[str, Any] | None:
        """What an earlier life of this node's agent has written, None for none.

        Raises UserError where that cannot be told: an agent that forgets its votes may give them twice.
        """
        path = self.path / f"{self.name}.json"
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return None
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}; this node's votes stand there.") from None

    def forget(self) -> None:
        """The job has ended, or this node has left it: nothing here binds a later one. Raises OSError."""
        for suffix in (".json", ".address"):
            (self.path / f"{self.name}{suffix}").unlink(missing_ok=True)

    def announce(self, address: str) -> None:
        """Where others find this node. Raises UserError where it cannot be written."""
        path = self.path / f"{self.name}.address"
        try:
            path.write_text(address, encoding="utf-8")
        except OSError as error:
            raise UserError(
                f"{path} cannot be written: {error.strerror}; the others could not find this node."
            ) from None

    def others(self) -> list[str]:
        """Addresses of the job's other agents, living or not."""
        return addresses(self.path.parent, but=self.name)


def addresses(run_folder: Path, but: str | None = None) -> list[str]:
    """Where agents of the job of this run folder listen, or did."""
    found = []
    for file in sorted((run_folder / "elastic").glob("*.address")):
        with suppress(OSError):  # its agent may leave at this moment
            if file.stem != but and (address := file.read_text(encoding="utf-8").strip()):
                found.append(address)
    return found
