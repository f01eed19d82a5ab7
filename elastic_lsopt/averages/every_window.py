"""When an average takes the weights: after the first step that ends in a window of samples that none has ended in yet.

    window = floor((t - t_0) / every)        t committed samples, t_0 those at which the average begins

So the moments follow from committed samples alone: a change of the batch or of the world, a resume or a skipped step
does not shift them. A step that is longer than a window ends one window, not several.
"""

from __future__ import annotations

from elastic_lsopt.errors import UserError
from elastic_lsopt.oracle.clock import SampleClock

NONE_YET = -1
"""The window before the first."""


def begins_at(name: str, start: float, clock: SampleClock) -> float:
    """The committed samples at which the share `start` of the run is over.

    Raises UserError for a share of a run whose length is not known.
    """
    if not start:
        return 0.0
    if clock.total_samples is None:
        raise UserError(
            f"{name}: start={start:g} is a share of the run, whose length is not known; build the engine with "
            "total_samples, or use start=0."
        )
    return start * clock.total_samples


def window(samples: int, first: float, every: int) -> int:
    """The window in which so many committed samples lie; NONE_YET before the first.

    >>> [window(t, 100, 50) for t in (99, 100, 149, 150)]
    [-1, 0, 0, 1]
    """
    return int((samples - first) // every) if samples >= first else NONE_YET
