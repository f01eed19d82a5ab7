"""EAMSGD: EASGD whose replicas step with Nesterov's momentum.

    v_i <- m v_i - eta g(x_i + m v_i);   x_i <- x_i + v_i, and every tau steps the elastic force of EASGD

Zhang, Choromanska, LeCun: "Deep learning with Elastic Averaging SGD", NeurIPS 2015, arXiv 1412.6651, equations 5 and 6,
momentum 0.99. Rest point: beta = 0, independent runs with momentum.

Differs from the paper as EASGD does, and in: the momentum is the base's (`torch.optim.SGD(…, momentum=0.99,
nesterov=True)`), which takes the gradient at x_i and not at x_i + m v_i, as torch writes Nesterov's; it never meets
the others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from elastic_lsopt.consensus.easgd import EASGD
from elastic_lsopt.consensus.registry import register
from elastic_lsopt.facts import Facts


@register("eamsgd")
@dataclass(frozen=True, kw_only=True)
class EAMSGD(EASGD):
    """Cost, memory and communication are EASGD's. Raises UserError for a base without momentum."""

    needs_momentum: ClassVar[bool] = True
    facts: ClassVar[Facts] = Facts(
        paper="Zhang, Choromanska, LeCun 2015, arXiv 1412.6651", passes="0", memory="1; 3 within an exchange",
        communication="a reduction per tau steps", needs="a base with momentum",
    )  # fmt: skip
