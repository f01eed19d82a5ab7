"""Schedule-free SGD and AdamW: an average in place of a schedule, without a length of the run.

    y = (1 - b) z + b x                the weights: the gradient g is taken here
    u = g + wd y                       sgd
    u = g / (sqrt(v / (1 - b2^t)) + eps) + wd y,   v = b2 v + (1 - b2) g^2     adamw
    z = z - lr u
    x = (1 - c) x + c z                c = p_t / sum p,   p_t = t^r (largest lr so far)^power

Defazio, Yang, Mehta, Mishchenko, Khaled, Cutkosky: "The Road Less Scheduled", NeurIPS 2024, arXiv 2405.15682. As in the
authors' package only y (the weights) and z are kept: y moves by c (z - y) + lr (b (1 - c) - 1) u. The model is at x: it
is evaluated, probed and exported there, `engine.averaged("schedule_free")`. Rest point: interpolation = 1 (not allowed
here, as x could not be had back) is averaged SGD, 0 is SGD with its mean beside it.

Differs from the authors' package in: 1. the warm-up is the job's schedule, whose rates it sees; 2. what it keeps per
param group is kept per parameter. A rate that falls by a schedule is not what the method is for: use constant.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from elastic_lsopt.by_name import require, require_number, require_share
from elastic_lsopt.facts import Facts
from elastic_lsopt.oracle.method import State
from elastic_lsopt.space.geometry import ParameterSpace
from elastic_lsopt.space.vector import Vector
from elastic_lsopt.updates.registry import register
from elastic_lsopt.updates.update import Rates, Update, count_steps, keep_numbers, numbers


@register("schedule_free")
@dataclass(frozen=True, kw_only=True)
class ScheduleFree(Update):
    """Memory: one Vector (sgd) or two (adamw), 1/N per rank; one more while the model is at x. Communication: none.

    Raises UserError for a value out of range.
    """

    facts: ClassVar[Facts] = Facts(
        paper="Defazio, Yang, Mehta, Mishchenko, Khaled, Cutkosky 2024, arXiv 2405.15682", memory="1 (sgd), 2 (adamw)"
    )

    form: Literal["adamw", "sgd"] = "adamw"
    """Whose step z takes."""
    interpolation: float = 0.9
    """b, how far the weights are from z towards x; > 0 and < 1. The paper: 0.9; 0.95 to 0.98 for long runs. (Not named
    momentum or betas, because no schedule and no rule of batch scaling may move it.)"""
    beta2: float = 0.999
    """b2 of the second moment; >= 0 and < 1. For adamw only."""
    eps: float = 1e-8
    """Beside the root of the second moment; >= 0. For adamw only."""
    r: float = 0.0
    """Power of the step in the weight of z; >= 0."""
    power: float = 2.0
    """Power of the largest rate so far in the weight of z; >= 0. The package's weight_lr_power."""

    def __post_init__(self) -> None:
        require(self.form in ("adamw", "sgd"), "form", self.form, "adamw or sgd")
        within = isinstance(self.interpolation, int | float) and 0 < self.interpolation < 1
        require(within, "interpolation", self.interpolation, "a number > 0 and < 1")
        require_share("beta2", self.beta2)
        for name in ("eps", "r", "power"):
            require_number(name, getattr(self, name))

    @property
    def decoupled_weight_decay(self) -> bool:  # type: ignore[override]
        return self.form == "adamw"

    def init(self, space: ParameterSpace) -> State:
        second = {"v": space.zeros()} if self.form == "adamw" else {}
        return {"z": space.weights.clone(), **second}

    def update(self, space: ParameterSpace, gradient: Vector, state: dict[str, Any], rates: Rates) -> None:
        y, z, u = space.weights, state["z"], gradient
        steps = count_steps(space, state)
        if self.form == "adamw":
            v = state["v"].mul_(self.beta2).addcmul_(u, u, 1 - self.beta2)
            u.div_(v.clone().mul_each_([1 / (1 - self.beta2**t) for t in steps]).sqrt_().add_(self.eps))
        u.add_each_(y, rates.weight_decay)
        c = self._shares(space, state, steps, rates)
        y.lerp_each_(z, c)
        y.add_each_(u, [lr * (self.interpolation * (1 - share) - 1) for lr, share in zip(rates.lr, c, strict=True)])
        z.add_each_(u, [-lr for lr in rates.lr])

    def _shares(self, space: ParameterSpace, state: dict[str, Any], steps: list[int], rates: Rates) -> list[float]:
        """c of each parameter."""
        largest = [max(pair) for pair in zip(numbers(space, state, "lr", 0.0), rates.lr, strict=True)]
        weights = [t**self.r * lr**self.power for t, lr in zip(steps, largest, strict=True)]
        sums = [a + b for a, b in zip(numbers(space, state, "weights", 0.0), weights, strict=True)]
        keep_numbers(space, state, "lr", largest)
        keep_numbers(space, state, "weights", sums)
        return [weight / total if total else 0.0 for weight, total in zip(weights, sums, strict=True)]

    def point(self, space: ParameterSpace, state: dict[str, Any]) -> Vector:
        return space.weights.clone().lerp_(state["z"], 1 - 1 / self.interpolation)
