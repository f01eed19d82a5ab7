"""One rank's memory, part by part: what is kept, what a pass and a step add for a while."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, field

from elastic_lsopt.training.estimate.activations import Pass
from elastic_lsopt.training.estimate.offload import kept_beside
from elastic_lsopt.training.estimate.placement import FP32, Placement
from elastic_lsopt.training.estimate.size import ModelSize
from elastic_lsopt.training.estimate.state import state_per_rank
from elastic_lsopt.training.estimate.transients import in_pass, in_step, kept_buffers

WHILE_PERTURBED = ("way back of a perturbation", "direction of the method")


@dataclass(frozen=True, kw_only=True)
class RankMemory:
    """Bytes in one place; the peak is of the pass, the step, a probe or an exchange, whichever is larger."""

    kept: dict[str, int]
    """From step to step."""
    in_pass: dict[str, int]
    """Beside that at the worst moment of a pass, the method's own among it; empty: the activations are not known."""
    in_step: dict[str, int]
    """Beside that while the optimizer steps."""
    in_probe: dict[str, int] = field(default_factory=dict)
    """Beside that while the largest probe measures, at least: its vectors, and what a gradient takes."""
    in_exchange: dict[str, int] = field(default_factory=dict)
    """Beside that while replicas exchange."""

    @property
    def peak(self) -> int:
        return sum(self.kept.values()) + max(
            sum(p.values()) for p in (self.in_pass, self.in_step, self.in_probe, self.in_exchange)
        )

    def parted(self, names: Container[str]) -> tuple[RankMemory, RankMemory]:
        """All parts but those of these names, and those."""

        def of(chosen: bool) -> RankMemory:
            return RankMemory(
                **{
                    phase: {name: size for name, size in parts.items() if (name in names) == chosen}
                    for phase, parts in vars(self).items()
                }
            )

        return of(False), of(True)


def memory_of_rank(
    size: ModelSize,
    moments: Pass | None,
    at: Placement,
    *,
    optim: str = "adamw",
    momentum: float = 0.0,
    method: str = "none",
    averages: int = 0,
    watched: int = 0,
    consensus: tuple[int, int] = (0, 0),
    probes: tuple[int, int] = (0, 0),
    microbatches: int = 1,
    gpu: bool = False,
) -> RankMemory:
    """`moments` is a micro-batch's pass on storage-less tensors, None where it cannot be had; `microbatches` those of a
    rank in a pass; `probes` the vectors that probes keep, and that one holds while it measures; `consensus` those that
    its rule keeps, and while replicas exchange."""
    kept = state_per_rank(
        size.parameters, at, frozen=size.frozen, optim=optim, momentum=momentum, method=method, averages=averages,
        watched=watched, grams=size.grams,
    )  # fmt: skip
    passing = {name: kept.pop(name) for name in WHILE_PERTURBED}
    kept["communication buffers"] = kept_buffers(size, at)
    kept |= kept_beside(size, at, microbatches=microbatches)
    vector, (always, measuring) = FP32 * at.share(size.parameters), probes
    kept["probes"] = always * vector
    if any(consensus):
        kept["what consensus keeps"] = consensus[0] * vector
    exchanging = {"an exchange of replicas": consensus[1] * vector} if consensus[1] else {}
    probing = {"probes while they measure": measuring * vector} if measuring else {}
    if moments is not None:
        a_gradient = in_pass(moments, size, at, microbatches=microbatches)
        passing |= a_gradient
        probing |= a_gradient if measuring else {}
    stepping = in_step(size, at, optim=optim, gpu=gpu)
    return RankMemory(kept=kept, in_pass=passing, in_step=stepping, in_probe=probing, in_exchange=exchanging)
