"""What a step tells."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

from elastic_lsopt.oracle.clock import SampleClock
from elastic_lsopt.space.perturbation import Fidelity

log = logging.getLogger("elastic_lsopt")
FAITHFUL = 0.9
"""Cosine between requested and realised perturbation below which the run warns."""


@dataclass(frozen=True)
class Piggyback:
    """What rides on a pass's all-reduce for the elastic runtime: a rank's own numbers, or their sums over the ranks."""

    newer_generation: float = 0.0
    """Ranks that know of a newer generation."""
    trailing: tuple[float, ...] = ()
    """Ranks whose mirrors trail by more than 0, 1, … versions of the state."""

    @property
    def numbers(self) -> list[float]:
        return [self.newer_generation, *self.trailing]

    @staticmethod
    def of(numbers: Sequence[float]) -> Piggyback:
        """What `numbers` were of, summed."""
        newer, *trailing = numbers
        return Piggyback(newer, tuple(trailing))


@dataclass(frozen=True)
class StepReport:
    """One optimizer step: the loss at the weights before it, and what became of it."""

    loss: float
    """Mean loss of the first pass over the global batch."""
    passes: float
    """Gradients of the global batch that were taken, three for a product with the Hessian; not whole where a method
    looks at parts of the batch."""
    gradient_norm: float
    """Global L2 norm of the gradient that the base stepped with, before clipping."""
    samples: int
    """Of the global batch."""
    skipped: bool
    """A loss or gradient was not finite in some pass, so no rank changed anything but its clock."""
    stop: bool = False
    """Some rank asked to stop; all ranks see it after the same step."""
    piggyback: Piggyback | None = None
    """Sums over all ranks of what the elastic runtime gave to the step's last pass; None where it gave nothing."""
    samples_per_second: float | None = None
    """Of this rank's own forwards. Where a forward needs no other rank (plain, DDP), waiting is not in it."""
    fidelity: Fidelity | None = None
    """Requested against realised perturbation, where it was measured."""
    clock: SampleClock = field(default_factory=SampleClock)
    """Where the job stands after the step: the samples of all replicas, those of skipped steps too."""


def warn_unfaithful(fidelity: Fidelity, dtype: object) -> None:
    """One line with the remedies, for a perturbation that rounding has changed."""
    log.warning(
        "the forward pass in %s sees another perturbation than the method asked for: cosine %.2f, length ratio %.2f. "
        "Remedies: rho_scale: sqrt_n, a radius per row (radius: row), or an fp32 forward.",
        dtype, fidelity.cosine, fidelity.norm_ratio,
    )  # fmt: skip
