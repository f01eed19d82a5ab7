"""The sample clock: schedules run on committed samples, so a change of batch or world keeps their shape."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from elastic_lsopt.errors import UserError

BatchAt = Callable[[int], int]
"""Samples of the step that begins at so many committed samples, but for the last step of a job."""
NO_WINDOW = -1
"""Before the first window."""


@dataclass(frozen=True)
class SampleClock:
    """Samples whose optimizer step has ended, steps so far, and the samples of the whole run (None: not known).

    >>> SampleClock(total_samples=100).advanced(25).progress
    0.25
    """

    samples: int = 0
    steps: int = 0
    total_samples: int | None = None

    @property
    def progress(self) -> float:
        """Share of the run that is done, in [0, 1]; 0 where the length of the run is not known."""
        return min(self.samples / self.total_samples, 1.0) if self.total_samples else 0.0

    def at_share(self, share: float, who: str = "a schedule") -> float:
        """The committed samples at which this share of the run is over.

        Raises UserError, in the name of `who`, for a share > 0 of a run whose length is not known.
        """
        if share and self.total_samples is None:
            raise UserError(
                f"{who}: {share:g} of the run is asked for, whose length is not known; build the engine with "
                "total_samples, or use 0."
            )
        return share * (self.total_samples or 0)

    def window(self, every: int, first: float = 0.0) -> int:
        """In which window of `every` samples the clock stands, counted from `first` on; NO_WINDOW before it.

        What happens once per window happens after the first step that ends in one where no step has ended yet: these
        moments follow from committed samples alone, whatever the batch is; a step longer than a window ends one.

        >>> [SampleClock(samples=t).window(50, first=100) for t in (99, 100, 149, 150)]
        [-1, 0, 0, 1]
        """
        return int((self.samples - first) // every) if self.samples >= first else NO_WINDOW

    def advanced(self, samples: int) -> SampleClock:
        """The clock after a step on `samples` samples; a skipped non-finite step commits its samples too."""
        return replace(self, samples=self.samples + samples, steps=self.steps + 1)


def steps_between(batch_at: BatchAt, position: int, end: int) -> int:
    """Steps from one cursor to another; one look at the batch per step."""
    steps = 0
    while position < end:
        position += batch_at(position)
        steps += 1
    return steps
