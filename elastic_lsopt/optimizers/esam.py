"""ESAM: SAM that moves some of the tensors, and takes the second gradient on the samples that this hurts most.

    S   each parameter with probability beta, drawn for the step
    g   = grad L(w);   e = rho / beta  g_S / (||g_S|| + 1e-7)
    B'  = the share gamma of the batch whose losses rise most from w to w + e
    w  <- base step with grad L_B'(w + e)

Du, Yan, Feng, Zhou, Zhen, Goh, Tan: "Efficient Sharpness-aware Minimization for Improved Training of Neural Networks",
ICLR 2022, arXiv 2110.03141, Algorithm 1. Rest point: beta = gamma = 1, which is SAM.

The samples are chosen from the batch of all ranks, so they are the same at any world size; the authors choose on each
device (and drop one more where losses tie). A sample's loss is its mean over its terms, its weight their number.
Dropout in the second gradient is that of the smaller micro-batch.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import ClassVar

from elastic_lsopt.by_name import require
from elastic_lsopt.facts import Facts
from elastic_lsopt.optimizers.ascent import Ascent
from elastic_lsopt.optimizers.perturbed import chosen, masked, norm_of_taken
from elastic_lsopt.optimizers.registry import register
from elastic_lsopt.oracle.method import State
from elastic_lsopt.oracle.oracle import Oracle
from elastic_lsopt.space.geometry import ParameterSpace
from elastic_lsopt.space.random.noise import block_seed
from elastic_lsopt.space.vector import Vector


@register("esam")
@dataclass(frozen=True, kw_only=True)
class ESAM(Ascent):
    """Cost: a pass, a forward, and the share gamma of a pass. Memory: SAM's; a number per sample.

    Communication: all-reduces of a number per parameter, micro-batch, and of two per sample. Raises UserError for a
    value out of range, or a loss that is not an lso.Loss.
    """

    beta: float = 0.5
    """Probability with which a parameter is moved; in (0, 1]. The paper: 0.5 or 0.6."""
    gamma: float = 0.5
    """Share of the samples of the second gradient; in (0, 1]. The paper: 0.5."""

    needs_logits: ClassVar[bool] = True
    tiny: ClassVar[float] = 1e-7
    facts: ClassVar[Facts] = Facts(
        paper="Du et al. 2022, arXiv 2110.03141", passes="1 + gamma, and a forward", memory="0; 1 while perturbed",
        communication="all-reduces of a number per parameter and two per sample", needs="lso.Loss",
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in (("beta", self.beta), ("gamma", self.gamma)):
            require(isinstance(value, int | float) and 0 < value <= 1, name, value, "a number > 0 and <= 1")
        require(self.radius == "model", "radius", self.radius, "model: esam's own choice of tensors is in it")

    def gradient(self, space: ParameterSpace, oracle: Oracle, state: State) -> Vector:
        if not self.goes_up(oracle.step):
            return oracle.gradient()
        g, before = oracle.gradient_and_sample_losses()
        direction, _ = self.along(space, oracle, g)
        taken = self._drawn(space, oracle)
        length = norm_of_taken(space.norm_per_parameter(direction), taken)
        scale = masked(self.rho_at(space, oracle) / self.beta / (length + self.tiny), taken, space)
        with space.perturbed(direction, scale):
            return oracle.gradient_of_risen(before, oracle.sample_losses(), self.gamma)

    def _drawn(self, space: ParameterSpace, oracle: Oracle) -> tuple[bool, ...]:
        """The parameters of this step: the same on all ranks."""
        may = chosen(self.perturb, space)
        draw = random.Random(block_seed(space.seed, "esam", oracle.step))
        drawn = tuple(m and draw.random() < self.beta for m in may)
        return drawn if any(drawn) else may
