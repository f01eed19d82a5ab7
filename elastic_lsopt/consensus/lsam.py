"""LSAM: SAM in each replica, and an elastic force between the replicas, which smooths the loss that SAM sees.

    x_i <- base step with the gradient at x_i + rho g / ||g||;   every tau steps EASGD's force and centre

Teng, Zhang: "LSAM: Asynchronous Distributed Training with Landscape-Smoothed Sharpness-Aware Minimization", arXiv
2509.03110, of which the abstract could be read and not the constants: so EASGD's are here. Rest point: rho = 0, EASGD.

Differs from the paper in: replicas meet every tau of their own steps, where the paper's ask a server at any time. What
else differs is not known.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from elastic_lsopt.consensus.easgd import EASGD
from elastic_lsopt.consensus.registry import register
from elastic_lsopt.facts import Facts


@register("lsam")
@dataclass(frozen=True, kw_only=True)
class LSAM(EASGD):
    """Cost, memory and communication are EASGD's beside SAM's. Raises UserError where the method is not sam."""

    needs_method: ClassVar[str] = "sam"
    facts: ClassVar[Facts] = Facts(
        paper="Teng, Zhang 2025, arXiv 2509.03110", passes="0", memory="1; 3 within an exchange",
        communication="a reduction per tau steps", needs="the method sam",
    )  # fmt: skip
