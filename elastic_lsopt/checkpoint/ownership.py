"""One job writes into a run folder at a time: a claim that its owner keeps alive, and that a dead owner does not hold.

    .owner-7.json    {"job": "3f2a…", "host": "node-1", "process": 4711, "lives_in": "…", "born": "…", "beats": 12}

[Note: claims] Folders lie on file systems that several nodes share, where locks of the kernel may be missing or may be
local to a node. All that is asked of them is that one of two processes that create the same file wins. Claims are
numbered, and the highest one counts. Whoever finds that its owner is dead creates the next number, so of two that find
it at once one wins; the old claim is then deleted. An owner is dead where its process is seen to be, in the same kernel
and process namespace; elsewhere, where its claim's beats stand still for SILENCE_S of the finder's own clock. (Clocks
of nodes are never compared.) An owner that was suspended for longer has lost the folder: it finds a higher claim before
it commits a checkpoint or prunes one, and does neither.

[Note: a job with many writers] In an elastic job rank 0 moves from process to process and from node to node. Its
workers know the job's own name from each other, so a new rank 0 takes over a claim of that name at once.
"""

from __future__ import annotations

import json
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from elastic_lsopt.errors import UserError

BEAT_S = 2.0
SILENCE_S = 20.0
LOOK_S = 0.5
_NAME = re.compile(r"\.owner-(\d+)\.json")
Claim = dict[str, Any]


class Ownership:
    """This process's claim on a folder, from `take` until `release`, kept alive by a thread of its own."""

    def __init__(self, folder: Path, number: int, job: str) -> None:
        self.job, self._folder, self._number = job, folder, number
        self._path, self._beats = folder / f".owner-{number}.json", 0
        self._over = threading.Event()
        self.lost = False
        """Whether the folder was taken from this owner, as far as its last beat knows."""

    @classmethod
    def take(cls, folder: Path, job: str = "", *, say: Callable[[str], None] = lambda line: None) -> Ownership:
        """Claim the folder for a job, "" for a new one; `say` gets a line where that takes a while.

        Raises UserError where another job that lives holds it, OSError where the folder cannot be written.
        """
        folder.mkdir(parents=True, exist_ok=True)
        job = job or uuid.uuid4().hex
        while True:
            before = _claims(folder)
            for number in before:
                _refuse_living(folder, number, job, say)
            own = cls(folder, max(before, default=0) + 1, job)
            if own._create() and own._alone(before):
                for number in before:
                    (folder / f".owner-{number}.json").unlink(missing_ok=True)
                threading.Thread(target=own._beat, daemon=True, name="owner").start()
                return own

    @property
    def held(self) -> bool:
        """Whether the folder still is this job's, by a look at it: False after it was taken from a silent owner."""
        return not self._over.is_set() and max(_claims(self._folder), default=0) == self._number

    def leave_to_next(self) -> None:
        """Stop to keep the claim alive, and leave it where it is: the same job's next rank 0 takes it over."""
        self._over.set()

    def release(self) -> None:
        """The job has ended: the folder is free."""
        self._over.set()
        with suppress(OSError):
            self._path.unlink(missing_ok=True)

    def _create(self) -> bool:
        """Whether this process created the file of its number; it is there in full from its first moment on."""
        draft = self._folder / f".owner-{self.job}-{os.getpid()}.draft"
        draft.write_text(json.dumps(self._claim()), encoding="utf-8")
        try:
            os.link(draft, self._path)
            return True
        except FileExistsError:
            return False
        except OSError:  # a file system without links
            with suppress(FileExistsError), self._path.open("x", encoding="utf-8") as out:
                json.dump(self._claim(), out)
                return True
            return False
        finally:
            draft.unlink(missing_ok=True)

    def _alone(self, before: list[int]) -> bool:
        """Whether nobody has come meanwhile, by another number; else this claim is taken back."""
        if {*_claims(self._folder)} <= {*before, self._number}:
            return True
        self._path.unlink(missing_ok=True)
        time.sleep(LOOK_S * (1 + os.getpid() % 7))  # else two that meet would meet again
        return False

    def _claim(self) -> Claim:
        return {
            "job": self.job, "host": socket.gethostname(), "process": os.getpid(), "lives_in": _kernel(),
            "born": _born(os.getpid()), "beats": self._beats,
        }  # fmt: skip

    def _beat(self) -> None:
        while not self._over.wait(BEAT_S):
            self._beats += 1
            try:
                # Never made anew: whoever has deleted it owns the folder now. A claim grows, so nothing is cut off.
                with self._path.open("r+", encoding="utf-8") as out:
                    out.write(json.dumps(self._claim()))
            except FileNotFoundError:
                self.lost = not self._over.is_set()
                return
            except OSError:
                continue


def owner_of(folder: Path) -> tuple[Claim, bool | None] | None:
    """Who holds a folder, and whether it lives; None for that where only time could tell. None: nobody does."""
    for number in sorted(_claims(folder), reverse=True):
        if (claim := _read(folder, number)) is not None:
            return claim, _lives(claim)
    return None


def _refuse_living(folder: Path, number: int, job: str, say: Callable[[str], None]) -> None:
    """Return where the owner of that claim is dead, or is this job itself."""
    first = claim = _read(folder, number)
    since, told = time.monotonic(), False
    while claim is not None and claim["job"] != job:
        lives = _lives(claim)
        if lives or (lives is None and claim != first and first is not None):
            raise UserError(
                f"{folder} is in use: a job on {claim['host']}, process {claim['process']}, writes there; give this "
                "one another output_dir, or stop that one first."
            )
        if lives is False or time.monotonic() - since > SILENCE_S:
            return
        if not told:
            told = True
            say(f"{folder} was left by a job on {claim['host']}; watching for {SILENCE_S:.0f} s whether that one lives")
        time.sleep(LOOK_S)
        claim = _read(folder, number)


def _lives(claim: Claim) -> bool | None:
    """Whether the process of a claim lives; None where it is none of this kernel's and process namespace's."""
    if not claim["lives_in"] or claim["lives_in"] != _kernel():
        return None
    return _born(claim["process"]) == claim["born"]


def _kernel() -> str:
    """Names this kernel's life and this process's namespace: equal where process numbers mean the same processes."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    return ""


def _born(process: int) -> str:
    """When a process started, by its kernel's clock; "" for one that has ended, also where nobody has reaped it yet."""
    with suppress(OSError):
        told = Path(f"/proc/{process}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
        return "" if told[0] in "ZX" else told[19]
    return ""


def _claims(folder: Path) -> list[int]:
    if not folder.is_dir():
        return []
    return [int(found[1]) for path in folder.iterdir() if (found := _NAME.fullmatch(path.name))]


def _read(folder: Path, number: int) -> Claim | None:
    """None where it has gone. One that is being written is read again."""
    for _ in range(5):
        try:
            return json.loads((folder / f".owner-{number}.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except ValueError:
            time.sleep(0.05)
    return {"job": "?", "host": "?", "process": 0, "lives_in": "", "born": "", "beats": -1}
