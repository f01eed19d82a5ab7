"""What an update looks at beside the method's gradient: a quantity of the step's own batch, before one of its passes.

    sampled_gradient    the gradient for labels that are drawn from the model    one gradient of the global batch
    hessian_diagonal    z * H z, z = 1 or -1 with equal odds: its mean is diag H       one product, 3 gradients

It is made where the weights are when that pass begins, and before anything of the pass is there, so no gradient that
somebody still needs is lost and none is copied. It is the same at any world size: labels are drawn by (seed, step,
micro-batch), z by (seed, step, parameter, element). One observation serves all updates that look for the same. What is
not finite skips the step; what was seen before another pass is not finite, stays seen.

[Note: checks] A kernel's backward may be a constant to autograd, and H z silently wrong. So the first product of an
engine is checked (`curvature/curvature_checks.py`, up to ten gradients), which also settles how products are made.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from elastic_lsopt.errors import NonFinite, UserError
from elastic_lsopt.oracle.curvature.products import Mode
from elastic_lsopt.oracle.losses.loss import Loss
from elastic_lsopt.space.geometry import ParameterSpace
from elastic_lsopt.space.vector import Vector

if TYPE_CHECKING:
    from elastic_lsopt.oracle.oracle import Oracle

Sees = Literal["nothing", "sampled_gradient", "hessian_diagonal"]
Where = Literal["weights", "last_pass"]
GRADIENTS_PER_PRODUCT = 3
"""What a product with the Hessian counts in a step's passes."""
SIGNS = -1
"""The draw of a step's noise whose signs are z; methods count theirs from 0."""


@dataclass(frozen=True)
class Seen:
    """What was observed: a vector that ends with the call, and the total weight of the batch (samples or tokens)."""

    vector: Vector
    weight: float


@dataclass
class HowProducts:
    """How an engine's products are made: settled by the checks at its first one."""

    mode: Mode = "auto"
    checked: bool = False


@dataclass(frozen=True)
class Observation:
    """One that is due in this step."""

    sees: Sees
    before: int
    """The number of the pass before which it is made, from 0."""
    tell: Callable[[Seen], None]
    how: HowProducts


def observe(oracle: Oracle) -> None:
    """Make what is due before the pass that begins now (collective). Raises NonFinite as a pass does."""
    due = [o for o in oracle.observations if o.before == oracle.begun]
    if not due:
        return
    oracle.observations = [o for o in oracle.observations if o not in due]
    with oracle.aside():
        for observation in due:
            if observation.sees == "sampled_gradient":
                vector: Vector = oracle.sampled_gradient()
                oracle.observed += 1
            else:
                vector = oracle.hessian_diagonal(observation.how)
                if not math.isfinite(oracle.space.norm(vector)):
                    raise NonFinite(f"step {oracle.step}: the Hessian's diagonal that an update sees is inf or NaN")
                oracle.observed += GRADIENTS_PER_PRODUCT
            observation.tell(Seen(vector, oracle.weight))


def signs(space: ParameterSpace, step: int) -> Vector:
    """z of this step: 1 or -1, by (seed, step, parameter, element)."""
    z = space.noise(step, SIGNS).vector()
    for t in z.tensors:
        t.copy_((t >= 0).to(t.dtype).mul_(2).sub_(1))
    return z


def refuse_unseen(looking: Iterable[tuple[str, Sees]], loss: Any) -> None:
    """Raise UserError for (name, what it sees) of updates that cannot see it of this loss (None: a closure)."""
    for name, sees in looking:
        if loss is None:
            raise UserError(
                f"update {name} looks at the curvature of the loss, and a closure gives gradients only; use "
                "lso.Engine.of(model, base, loss_fn=…), lso.initialize or elastic-lsopt train."
            )
        if sees == "sampled_gradient" and (not isinstance(loss, Loss) or loss.sample is None):
            raise UserError(
                f"update {name} draws labels from the model, and this loss does not say how; give lso.Loss(forward, "
                "criterion, count, sample=…) as loss_fn, where sample(logits, batch) is the batch with drawn labels."
            )
