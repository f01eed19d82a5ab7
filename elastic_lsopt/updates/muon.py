"""Muon: momentum of a matrix, made orthogonal before it is a step.

    b = mu b + (1 - mu) g             u = (1 - mu) g + mu b        (Nesterov; else u = b)
    X = u / ||u||_F, transposed if it is taller than wide; `iterations` times  X = a X + (b' XX^T + c' (XX^T)^2) X
    w = (1 - lr wd) w - lr scale X    scale: sqrt(max(1, rows / columns)), or 0.2 sqrt(max(rows, columns))

Jordan, Jin, Boza, You, Cesista, Newhouse, Bernstein: "Muon: An optimizer for hidden layers in neural networks", 2024,
kellerjordan.github.io/posts/muon; the second scale: Liu et al.: "Muon is Scalable for LLM Training", 2025, arXiv
2502.16982, whose steps are as long as AdamW's, so that its learning rate serves. The iteration is computed in bf16.

Only matrices can be made orthogonal, and only whole ones: a shard's own iteration would be wrong without a word. Each
matrix comes together on one rank, is worked on there, and its step goes back. Rest point: iterations = 0, where the
step is the momentum over its length, in bf16.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from elastic_lsopt.by_name import require, require_share
from elastic_lsopt.errors import UserError
from elastic_lsopt.facts import Facts
from elastic_lsopt.oracle.method import State
from elastic_lsopt.space.geometry import ParameterSpace
from elastic_lsopt.space.vector import Vector
from elastic_lsopt.updates.registry import register
from elastic_lsopt.updates.update import Rates, Update

A, B, C = 3.4445, -4.7750, 2.0315
"""The quintic's coefficients, whose slope at 0 is as steep as it can be."""
TINY = 1e-7


def orthogonal(u: Tensor, iterations: int) -> Tensor:
    """About U V^T of u = U S V^T, a bf16 matrix: singular values between 0.7 and 1.2."""
    tall = u.size(0) > u.size(1)
    x = (u.T if tall else u).clone()
    x.div_(x.norm().clamp(min=TINY))
    for _ in range(iterations):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=B, alpha=C), x, beta=A)
    return x.T if tall else x


@register("muon")
@dataclass(frozen=True, kw_only=True)
class Muon(Update):
    """Time: this rank's share of the matrices. Memory: one Vector, 1/N per rank, and its share of whole matrices.

    Communication: an all-to-all of the momentum and one of the steps (one all-gather where all ranks hold all). Raises
    UserError for a value out of range, and for a parameter that is no matrix: give those another update.
    """

    facts: ClassVar[Facts] = Facts(
        paper="Jordan et al. 2024; Liu et al. 2025, arXiv 2502.16982",
        memory="1; in the step also this rank's share of whole matrices",
        communication="an all-to-all of the momentum and one of the steps (one all-gather where all ranks hold all)",
        needs="matrices; what is none takes another update",
    )

    decoupled_weight_decay: ClassVar[bool] = True
    first_moment: ClassVar[str] = "momentum"
    momentum: float = 0.95
    """mu; >= 0 and < 1."""
    nesterov: bool = True
    """Make (1 - mu) g + mu b orthogonal, not b."""
    iterations: int = 5
    """Newton-Schulz iterations; >= 0."""
    scale: Literal["original", "match_rms_adamw"] = "original"
    """original: sqrt(max(1, rows / columns)); match_rms_adamw: 0.2 sqrt(max(rows, columns)), as long as AdamW's steps
    are."""

    def __post_init__(self) -> None:
        require_share("momentum", self.momentum)
        whole = isinstance(self.iterations, int) and self.iterations >= 0
        require(whole, "iterations", self.iterations, "a whole number >= 0")
        require(self.scale in ("original", "match_rms_adamw"), "scale", self.scale, "original or match_rms_adamw")

    def init(self, space: ParameterSpace) -> State:
        for p in space.layout.parameters:
            if len(p.shape) != 2:
                raise UserError(
                    f"muon: parameter {p.name} has {len(p.shape)} dimension(s), and only matrices can be made "
                    "orthogonal; give it another update (param_groups: {match: …, dims: 2, optim: muon})."
                )
        return {"momentum": space.zeros()}

    def update(self, space: ParameterSpace, gradient: Vector, state: dict[str, Any], rates: Rates) -> None:
        momentum, w = state["momentum"].lerp_(gradient, 1 - self.momentum), space.weights
        u = gradient.lerp_(momentum, self.momentum) if self.nesterov else gradient.copy_(momentum)
        dealing = space.shards.dealing(range(len(space.layout.parameters)), torch.bfloat16)
        steps = {p: orthogonal(whole, self.iterations) for p, whole in dealing.gather(u.tensors).items()}
        for piece, t, step in zip(space.layout.pieces, w.tensors, dealing.scatter(steps), strict=True):
            lr, decay = rates.lr[piece.parameter], rates.weight_decay[piece.parameter]
            t.mul_(1 - lr * decay).add_(
                step.to(t.device), alpha=-lr * self._scale(*space.layout.parameters[piece.parameter].shape)
            )

    def _scale(self, rows: int, columns: int) -> float:
        if self.scale == "original":
            return math.sqrt(max(1.0, rows / max(columns, 1)))
        return 0.2 * math.sqrt(max(rows, columns))
