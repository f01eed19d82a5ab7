"""The way up, which the methods of SAM's family share: a step of length rho along the gradient, in all its variants.

    q = g                                  or  g / (sqrt(v) + 1e-8)  with Adam's second moment v (precondition)
    e = rho q / (||q|| + 1e-12)            ||.|| over the whole model, a parameter, or a row (radius); 0 elsewhere
        rho q / sqrt(<g, q>)               where the length is Adam's own (precondition: adam_metric)

`every: k` goes up on each k-th step only: MosaicML Composer's interval. `rho_scale: sqrt_n` keeps the length per
weight, so that a bf16 forward still sees the perturbation of a very large model. `perturb` says which parameters move.
`precondition` is from "Avoiding spurious sharpness minimization broadens applicability of SAM", ICML 2025, arXiv
2502.02407. We have not obtained its exact form; ours is the ball, or the metric, of Adam's coming step: v is what the
base will keep if it steps with the gradient at w, v = b2 v + (1 - b2) g^2 over 1 - b2^(t + 1), by its own b2 (RMSprop:
alpha; Adagrad: the sum; AMSGrad: the largest). The v of before it is 0 where a parameter or a row of an embedding is
used for the first time, and e would be that alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from elastic_lsopt.by_name import require, require_count
from elastic_lsopt.optimizers.perturbed import Perturb, chosen, masked, norm_of_taken, require_perturb
from elastic_lsopt.optimizers.scheduled import Scheduled, require_scheduled, value_at
from elastic_lsopt.oracle.base import Need
from elastic_lsopt.oracle.method import State
from elastic_lsopt.oracle.oracle import Oracle
from elastic_lsopt.space.geometry import ParameterSpace
from elastic_lsopt.space.vector import Scales, Vector

ADAM_EPS = 1e-8
REFERENCE_PARAMETERS = 1e7
"""Size of model at which `rho_scale: sqrt_n` leaves rho as it is."""
RADII, SCALES = ("model", "parameter", "row"), ("none", "sqrt_n")
PRECONDITIONS = ("none", "adam", "adam_metric")


@dataclass(frozen=True, kw_only=True)
class Ascent:
    """Fields that every method with a way up has. Raises UserError for a value out of range.

    Communication: none for the plain ball, else one small all-reduce (two: preconditioned and clipped). Memory while
    perturbed: one shard (none on ZeRO-1/2, bf16 ZeRO-3), and one Vector more where it is preconditioned.
    """

    rho: Scheduled = 0.05
    """L2 radius, in units of the weights; >= 0; or a schedule, {start: 0.02, end: 0.1, shape: linear}."""
    every: int = 1
    """Go up on each k-th step only; >= 1."""
    radius: Literal["model", "parameter", "row"] = "model"
    """What has length rho: the whole perturbation, that of each parameter, or that of each row."""
    rho_scale: Literal["none", "sqrt_n"] = "none"
    """sqrt_n: rho counts for a model of 1e7 parameters and grows with the square root of the number."""
    precondition: Literal["none", "adam", "adam_metric"] = "none"
    """adam: go up along the gradient over the root of the second moment that the base's coming step will have;
    adam_metric: and measure rho in it."""
    perturb: Perturb = field(default_factory=dict)
    """Which parameters move, by patterns of names: {match: …, exclude: ["*norm*"], dims: 2}; {}: all."""

    parts = 1
    tiny: ClassVar[float] = 1e-12
    """Beside the length, so that no gradient gives no perturbation."""

    def __post_init__(self) -> None:
        require_scheduled("rho", self.rho)
        require_count("every", self.every)
        require(self.radius in RADII, "radius", self.radius, "model, parameter or row")
        require(self.rho_scale in SCALES, "rho_scale", self.rho_scale, "none or sqrt_n")
        require(self.precondition in PRECONDITIONS, "precondition", self.precondition, "none, adam or adam_metric")
        require_perturb(self.perturb)
        metric = self.precondition == "adam_metric"
        require(not metric or self.radius == "model", "radius", self.radius, "model where precondition is adam_metric")

    @property
    def needs(self) -> frozenset[Need]:
        """What the base must keep."""
        return frozenset(() if self.precondition == "none" else ("second_moment",))

    def init(self, space: ParameterSpace) -> State:
        chosen(self.perturb, space)  # refuses what matches nothing
        return {}

    def goes_up(self, step: int) -> bool:
        """Whether this is a k-th step."""
        return step % self.every == 0

    def passes_at(self, step: int) -> int:
        """Passes that the step begins: where the last of them stands is what an update may look at."""
        return 2 if self.goes_up(step) else 1

    @contextmanager
    def up(self, space: ParameterSpace, oracle: Oracle, g: Vector, gradient: Vector | None = None) -> Iterator[None]:
        """Weights at w + e inside the block, for the gradient g, or a direction beside the `gradient` (collective)."""
        direction, length = self.along(space, oracle, g, gradient)
        scale = masked(self.rho_at(space, oracle) / (length + self.tiny), chosen(self.perturb, space), space)
        with space.perturbed(direction, scale):
            del direction, g, gradient
            yield

    def rho_at(self, space: ParameterSpace, oracle: Oracle) -> float:
        """rho at this point of the run, for a model of this size."""
        rho = value_at("rho", self.rho, oracle.clock)
        return rho * (math.sqrt(space.layout.numel / REFERENCE_PARAMETERS) if self.rho_scale == "sqrt_n" else 1.0)

    def along(
        self, space: ParameterSpace, oracle: Oracle, g: Vector, gradient: Vector | None = None
    ) -> tuple[Vector, float | Scales]:
        """The direction q of the way up, and its length; `gradient`: that at w, where g is another direction."""
        if self.precondition == "none":
            return g, self.length(space, g)
        assert oracle.base is not None
        root = oracle.base.second_moment(after=g if gradient is None else gradient).sqrt_()
        for t in root.tensors:
            t.add_(ADAM_EPS)
        q = g.clone().div_(root)
        if self.precondition == "adam":
            return q, self.length(space, q)
        return q, self.length(space, root.sqrt_().mul_(q))  # <g, q> = ||sqrt(root) q||^2

    def length(self, space: ParameterSpace, q: Vector) -> float | Scales:
        """||q||, by `radius`; over the parameters that move."""
        match self.radius:
            case "model":
                taken = chosen(self.perturb, space)
                return space.norm(q) if all(taken) else norm_of_taken(space.norm_per_parameter(q), taken)
            case "parameter":
                return space.norm_per_parameter(q)
            case _:
                return space.norm_per_row(q)
