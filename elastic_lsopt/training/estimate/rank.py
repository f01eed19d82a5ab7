"""One rank's memory on the device, part by part: what is kept, what a pass and a step add for a while."""

from __future__ import annotations

from dataclasses import dataclass

from elastic_lsopt.training.estimate.activations import Pass
from elastic_lsopt.training.estimate.placement import Placement
from elastic_lsopt.training.estimate.size import ModelSize
from elastic_lsopt.training.estimate.state import state_per_rank
from elastic_lsopt.training.estimate.transients import in_pass, in_step, kept_buffers

WHILE_PERTURBED = ("way back of a perturbation", "direction of the method")


@dataclass(frozen=True, kw_only=True)
class RankMemory:
    """Bytes on the device; the peak is of the pass or of the step, whichever is larger."""

    kept: dict[str, int]
    """From step to step."""
    in_pass: dict[str, int]
    """Beside that at the worst moment of a pass, the method's own among it; empty: the activations are not known."""
    in_step: dict[str, int]
    """Beside that while the optimizer steps."""

    @property
    def peak(self) -> int:
        return sum(self.kept.values()) + max(sum(self.in_pass.values()), sum(self.in_step.values()))


def memory_of_rank(
    size: ModelSize,
    moments: Pass | None,
    at: Placement,
    *,
    optim: str = "adamw",
    momentum: float = 0.0,
    method: str = "none",
    averages: int = 0,
    microbatches: int = 1,
    gpu: bool = False,
) -> RankMemory:
    """`moments` is a micro-batch's pass on storage-less tensors, None where it cannot be had; `microbatches` those of a
    rank in a pass."""
    kept = state_per_rank(
        size.parameters, at, frozen=size.frozen, optim=optim, momentum=momentum, method=method, averages=averages
    )
    passing = {name: kept.pop(name) for name in WHILE_PERTURBED}
    kept["communication buffers"] = kept_buffers(size, at)
    if moments is not None:
        passing |= in_pass(moments, size, at, microbatches=microbatches)
    return RankMemory(kept=kept, in_pass=passing, in_step=in_step(size, at, optim=optim, gpu=gpu))
