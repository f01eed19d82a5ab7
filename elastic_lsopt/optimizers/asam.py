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
from elastic_lsopt.optimizers.ascent import Ascent
from elastic_lsopt.optimizers.perturbed import chosen
from elastic_lsopt.optimizers.registry import register
from elastic_lsopt.optimizers.scheduled import Scheduled
from elastic_lsopt.oracle.method import State
from elastic_lsopt.oracle.oracle import Oracle
from elastic_lsopt.space.geometry import ParameterSpace
from elastic_lsopt.space.vector import Scales, Vector


@register("asam")
@dataclass(frozen=True, kw_only=True)
class ASAM(Ascent):
    """Cost: two passes. Memory: SAM's, and one vector (T g, then T^2 g) while perturbed; nothing between steps.

    Raises UserError for a value out of range, or where parameters came without names.
    """

    rho: Scheduled = 0.5
    """Radius in units of T's norm; >= 0, or a schedule. The paper: 0.5 on CIFAR-10, 1.0 on CIFAR-100."""
    eta: float = 0.01
    """Added to |w|, so that a zero weight can move; >= 0."""

    tiny: ClassVar[float] = 1e-16
    facts: ClassVar[Facts] = Facts(
        paper="Kwon et al. 2021, arXiv 2102.11600", passes="2 on every k-th step", memory="0; 2 while perturbed",
        communication="an all-reduce of a number", needs="parameters with names",
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number("eta", self.eta)
        require(self.precondition == "none", "precondition", self.precondition, "none: T is what stretches the ball")

    def init(self, space: ParameterSpace) -> State:
        require(
            any("weight" in p.name for p in space.layout.parameters), "parameter names",
            [p.name for p in space.layout.parameters[:2]],
            'those of the model, so that ASAM knows weights from biases (a name with "weight" in it); '
            "give the base optimizer model.named_parameters()",
        )  # fmt: skip
        return super().init(space)

    def gradient(self, space: ParameterSpace, oracle: Oracle, state: State) -> Vector:
        g = oracle.gradient()
        if not self.goes_up(oracle.step):
            return g
        with self.up(space, oracle, g):
            return oracle.gradient()

    def along(
        self, space: ParameterSpace, oracle: Oracle, g: Vector, gradient: Vector | None = None
    ) -> tuple[Vector, float | Scales]:
        d = g.clone()
        self._stretch_(space, d)
        # On the device, so that nothing waits for it; only the whole model's length is there without names' lengths.
        plain = self.radius == "model" and all(chosen(self.perturb, space))
        length = space.norm_on_device(d) if plain else self.length(space, d)
        self._stretch_(space, d)
        return d, length

    def _stretch_(self, space: ParameterSpace, d: Vector) -> None:
        """d <- T d, piece by piece, so that T never stands in memory whole."""
        for piece, x, w in zip(space.layout.pieces, d.tensors, space.weights.tensors, strict=True):
            if "weight" in space.layout.parameters[piece.parameter].name:
                x.mul_(w.abs().to(x.dtype).add_(self.eta))
