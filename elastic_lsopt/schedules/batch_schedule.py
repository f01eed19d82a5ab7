"""The global batch, a function of committed samples: `at(samples)` are the samples of the step that begins there.

    steps     B_0 until s_1, B_1 until s_2, …
    ramp      B_0 + b floor(s N / S) until S, then B_1         N = (B_1 - B_0) / b stages of a micro-batch b each

Growing batches in place of falling rates: Smith, Kindermans, Ying, Le, ICLR 2018, arXiv 1711.00489. The ramp at the
beginning of a run: Brown et al., "Language Models are Few-Shot Learners", 2020, arXiv 2005.14165, appendix B; its
stages are those of Megatron-LM's `--rampup-batch-size`.

Micro-batches keep their size and their global index, so any world size computes the same steps. How the rate follows is
`batch_scaling.py`'s; the batch that follows a measurement is `noise_scale_batch.py`'s.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Steps:
    """One batch after another.

    >>> tuple(Steps(first=32, changes=((100, 64),)).at(samples) for samples in (0, 99, 100))
    (32, 32, 64)
    """

    first: int
    changes: tuple[tuple[float, int], ...]
    """(committed samples, batch from there on), in order."""

    def at(self, samples: int) -> int:
        passed = bisect_right([when for when, _ in self.changes], samples)
        return self.changes[passed - 1][1] if passed else self.first


@dataclass(frozen=True, kw_only=True)
class Ramp:
    """From `first` to `last` in equal stages of a micro-batch each.

    >>> tuple(Ramp(first=2, last=8, samples=60, microbatch=2).at(samples) for samples in (0, 19, 20, 40, 59, 60))
    (2, 2, 4, 6, 6, 8)
    """

    first: int
    last: int
    samples: int
    """Committed samples after which it has ended."""
    microbatch: int
    """Divides `first` and `last`."""

    def at(self, samples: int) -> int:
        stages = abs(self.last - self.first) // self.microbatch
        done = min(samples * stages // self.samples, stages)
        return self.first + done * (self.microbatch if self.last > self.first else -self.microbatch)
