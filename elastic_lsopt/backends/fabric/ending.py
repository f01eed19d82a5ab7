"""How a process that has talked over gloo ends: by itself and well, or at once.

[Note: gloo and the interpreter's end] A gloo thread frees a piece of work after the main thread has been told that it
is done, and for that it needs the interpreter's lock, because the work holds a Python object. Where the interpreter is
ending by then, Python ends the thread in the middle of a destructor: "terminate called without an active exception",
exit code 134, after all work was done (plain torch with FSDP2 shows it too, after `destroy_process_group()` as well).
So a user's program waits at its end until gloo's threads sleep: a thread that wants the lock gets it meanwhile. The
commands of this package need no interpreter any more when all is done, and leave it out (`end`).
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
from pathlib import Path
from typing import NoReturn

THREAD = "pt_gloo_runloop"
"""What torch calls the threads that run a gloo group's work."""
LOOK_EVERY_S = 0.01
LONGEST_S = 5.0
"""A thread that works for longer works for a peer that is not there."""
_registered = False


def end_well() -> None:
    """Let this process end with its own exit code once it has a process group; see the note. Costs 0.02 s at the end.

    Registered once, when the first group is seen: what a program registers later runs before.
    """
    global _registered  # noqa: PLW0603
    if not _registered:
        _registered = True
        atexit.register(_wait_for_gloo)


def end(code: int) -> NoReturn:
    """End this process, whose work is done, after its threads and exit handlers, without the interpreter's own end."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    leave(code)


def leave(code: int) -> NoReturn:
    """End this process now, for where a thread may wait in the network for a peer that is dead."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except ValueError:  # somebody has closed it
            pass
        except OSError as error:
            code = code or 1  # what was to be read is not there
            if not isinstance(error, BrokenPipeError) and stream is sys.stdout:
                os.write(2, f"elastic-lsopt: the output could not be written: {error.strerror}.\n".encode())
    os._exit(code)


def _wait_for_gloo() -> None:
    end, before = time.monotonic() + LONGEST_S, None
    while time.monotonic() < end:
        time.sleep(LOOK_EVERY_S)  # which lets go of the interpreter's lock
        now = _threads()
        if now == before and all(state == "S" for state, _ in now.values()):
            return
        before = now


def _threads() -> dict[str, tuple[str, str]]:
    """Gloo's threads of this process: state and number of times that it went to sleep, by thread id."""
    found: dict[str, tuple[str, str]] = {}
    for task in Path("/proc/self/task").glob("*"):
        try:
            told = dict(line.split(":\t", 1) for line in (task / "status").read_text().splitlines() if ":\t" in line)
        except OSError:  # it has ended
            continue
        if told.get("Name", "").startswith(THREAD[:15]):
            found[task.name] = told["State"][:1], told.get("voluntary_ctxt_switches", "")
    return found
