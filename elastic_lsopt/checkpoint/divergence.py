"""Steps skipped in a row: when a job has diverged, which checkpoints are still good, and what it says at its end.

A skipped step changes no weight. So a checkpoint that is followed by skipped steps alone holds the very weights with
which no step can be taken: it is set aside, by another name, and the newest one before it is the last good state. (One
that was followed by a step with a finite loss is good.) Nothing is committed while steps are skipped, and nothing is
deleted before a step has shown that the newest checkpoint is good, so a diverging job cannot rotate its good ones away.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from elastic_lsopt.checkpoint.folder import listing, set_aside, step_of
from elastic_lsopt.errors import UserError


@dataclass
class Streak:
    """The steps that were skipped since the last that was not."""

    first: int = 0
    """The step with which it began; 0: there is none."""
    length: int = 0

    def note(self, step: int, *, skipped: bool) -> None:
        """Count a step that has ended."""
        if not skipped:
            self.first = self.length = 0
            return
        self.first = self.first or step
        self.length += 1

    @property
    def reason(self) -> str:
        """Why no step can be taken, in words."""
        return (
            f"{self.length} steps in a row were skipped, from step {self.first} on, because their loss or gradient was "
            "not finite"
        )


def set_bad_aside(folder: Path, first: int) -> None:
    """Rename the checkpoints of weights with which step `first` could not be taken. For rank 0."""
    try:
        for path in listing(folder):
            if step_of(path) >= first - 1:
                set_aside(path)
    except OSError as error:
        raise UserError(f"a checkpoint of a job that has diverged cannot be set aside: {error}.") from None


def last_words(reason: str, folder: Path | None, rewinds: int = 0) -> str:
    """The one line with which the job ends; `folder` is that of its checkpoints, None where it makes none."""
    good = next(iter(listing(folder)), None) if folder is not None else None
    after = f", also after {rewinds} rewind{'s' if rewinds > 1 else ''} at lower rates" if rewinds else ""
    stays = f"the last good checkpoint is {good}" if good else "there is no good checkpoint"
    return (
        f"the job has diverged: {reason}{after}; {stays}. Lower the learning rate, lengthen the warm-up or check the "
        "data, and start it again."
    )
