"""Adaptive SAM: SAM's ball, stretched along each weight by its own size, so that rescaling a layer changes nothing.

    T = |w| + eta for weights, 1 for biases
    g = grad L(w)
    e = rho T^2 g / (||T g|| + 1e-16)
    w <- base step with grad L(w + e)

Kwon, Kim, Park, Choi: "ASAM: Adaptive Sharpness-Aware Minimization for Scale-Invariant Learning of Deep Neural
Networks", ICML 2021, arXiv 2102.11600, eq. 7-9 and Algorithm 1. Rest point: rho = 0.

As the authors' code: a weight is a parameter whose name holds "weight" (norm gains too). The popular reimplementation
`davda54/sam` has no eta and stretches biases too, so its rho is another quantity (it needs 2.0 where this takes 0.5).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from elastic_lsopt.by_name import require, require_number
from elastic_lsopt.facts import Facts
from elastic_lsopt.optimizers.registry import register
from elastic_lsopt.oracle.method import State
from elastic_lsopt.oracle.oracle import Oracle
from elastic_lsopt.space.geometry import ParameterSpace
from elastic_lsopt.space.vector import Vector

TINY = 1e-16


@register("asam")
@dataclass(frozen=True, kw_only=True)
class ASAM:
    """Cost: two passes. Memory: SAM's, and one vector (T g, then T^2 g) while perturbed; nothing between steps.

    Raises UserError for a value out of range, or where parameters came without names.
    """

    facts: ClassVar[Facts] = Facts(
        paper="Kwon et al. 2021, arXiv 2102.11600",
        passes="2",
        memory="0; while perturbed 2 (1 on ZeRO-1/2 and bf16 ZeRO-3)",
        needs="names of the parameters",
    )

    rho: float = 0.5
    """Radius in units of T's norm; >= 0. The paper: 0.5 on CIFAR-10, 1.0 on CIFAR-100."""
    eta: float = 0.01
    """Added to |w|, so that a zero weight can move; >= 0."""

    parts = 1

    def __post_init__(self) -> None:
        require_number("rho", self.rho)
        require_number("eta", self.eta)

    def init(self, space: ParameterSpace) -> State:
        require(
            any("weight" in p.name for p in space.layout.parameters), "parameter names",
            [p.name for p in space.layout.parameters[:2]],
            'those of the model, so that ASAM knows weights from biases (a name with "weight" in it); '
            "give the base optimizer model.named_parameters()",
        )  # fmt: skip
        return {}

    def gradient(self, space: ParameterSpace, oracle: Oracle, state: State) -> Vector:
        d = oracle.gradient().clone()
        self._stretch_(space, d)
        norm = space.norm_on_device(d)
        self._stretch_(space, d)
        with space.perturbed(d, self.rho / (norm + TINY)):
            del d
            return oracle.gradient()

    def _stretch_(self, space: ParameterSpace, d: Vector) -> None:
        """d <- T d, piece by piece, so that T never stands in memory whole."""
        for piece, x, w in zip(space.layout.pieces, d.tensors, space.weights.tensors, strict=True):
            if "weight" in space.layout.parameters[piece.parameter].name:
                x.mul_(w.abs().to(x.dtype).add_(self.eta))
