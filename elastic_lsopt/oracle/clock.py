"""The sample clock: schedules run on committed samples, so a change of batch or world keeps their shape."""

from __future__ import annotations

from dataclasses import dataclass, replace


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

    def advanced(self, samples: int) -> SampleClock:
        """The clock after a step on `samples` samples; a skipped non-finite step commits its samples too."""
        return replace(self, samples=self.samples + samples, steps=self.steps + 1)
