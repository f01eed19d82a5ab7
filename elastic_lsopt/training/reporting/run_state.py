"""state.json in the run folder: running, stopped, finished or failed, and at which step; written by rank 0."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

STATE = "state.json"
EVERY_S = 10.0
"""A running job says its step about so often."""
State = Literal["running", "stopped", "finished", "failed"]


class RunState:
    """What a scheduler or a person reads when no process of the job is left. A full disk costs it, never the training.

    {"state": "stopped", "step": 40, "steps": 80, "time": seconds since 1970, "why": ""}
    """

    def __init__(self, run_folder: Path) -> None:
        self._path, self._said = run_folder / STATE, float("-inf")

    def say(self, state: State, step: int, steps: int, why: str = "") -> None:
        """Write it; `steps` is where the job ends, `why` one line for what failed."""
        self._said = time.monotonic()
        told = {"state": state, "step": step, "steps": steps, "time": time.time(), "why": why}
        draft = self._path.with_suffix(".draft")
        with suppress(OSError):
            draft.write_text(json.dumps(told) + "\n", encoding="utf-8")
            draft.replace(self._path)

    def running(self, step: int, steps: int) -> None:
        """As `say`, where that is EVERY_S ago."""
        if time.monotonic() - self._said > EVERY_S:
            self.say("running", step, steps)


def read_state(run_folder: Path) -> dict[str, Any] | None:
    """What the job of this folder said last; None where it has said nothing that can be read."""
    with suppress(OSError, ValueError):
        told = json.loads((run_folder / STATE).read_text(encoding="utf-8"))
        if isinstance(told, dict) and {"state", "step", "steps", "time", "why"} <= told.keys():
            return told
    return None
