"""How much of the sharpness that SAM removes lies in the loss by the logits, and how much in the logits by the weights.

    d = grad L(w + e) - grad L(w)         e = rho g / ||g||: what SAM adds to the gradient g = J(w)' u(w)
    l = J(w + e)' (u(w + e) - u(w))       through the logits' gradients u: GGN e for a small rho
    f = (J(w + e) - J(w))' u(w)           through their Jacobian J: the functional part, d = l + f
    value = <l, d> / ||d||^2              and <f, d> / ||d||^2 is the rest of 1

Singh, Mobahi, Agarwala, Dauphin: "Avoiding spurious sharpness minimization broadens applicability of SAM", ICML 2025,
arXiv 2502.02407, which tells the two parts apart; shares by projection are this project's choice, so that they add up.
They lie outside of [0, 1] where the parts pull against each other.

Cost: three gradients; memory: two vectors, one shard while perturbed, and the logits of this rank's micro-batches.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

from elastic_lsopt.oracle.oracle import Oracle
from elastic_lsopt.probes.flatness.neighbourhood import refuse_not_positive, resynced
from elastic_lsopt.space.geometry import ParameterSpace
from elastic_lsopt.space.precision import full_precision


@dataclass(frozen=True)
class LogitShare:
    """`value`, and the lengths of the two parts over that of what SAM adds; NaN where SAM adds nothing."""

    value: float
    logit_length: float
    functional_length: float
    gradients: int
    seconds: float


@full_precision()
def logit_share(space: ParameterSpace, oracle: Oracle, *, rho: float = 0.05) -> LogitShare:
    """The logits' share at `rho` > 0, in units of the weights (collective).

    Raises UserError for a rho out of range, and where the loss is not an lso.Loss; NonFinite where a loss or gradient
    is inf or NaN.
    """
    refuse_not_positive("rho", rho)
    began = time.monotonic()
    with resynced(space):
        lent, by_logits = oracle.gradient_and_pull()
        g = lent.clone()
        length = space.norm(g)
        with space.perturbed(g, rho / length if length else 0.0):
            functional = oracle.pullback(by_logits).clone()
            added = oracle.gradient().clone()
        added.add_(g, alpha=-1.0)
        functional.add_(g, alpha=-1.0)
    total, f, along = space.norm(added), space.norm(functional), space.dot(functional, added)
    # l = d - f, so its length needs no third vector.
    logits = math.sqrt(max(total**2 - 2 * along + f**2, 0.0))
    square = total**2 or math.nan
    return LogitShare(
        1 - along / square, logits / math.sqrt(square), f / math.sqrt(square), 3, time.monotonic() - began
    )
