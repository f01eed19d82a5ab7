"""Bi-LoRA: beside the adapter that is trained a second one that moves the weights against it, in the same pass.

    W'     = W + s B A + s B2 A2           of every adapted layer, m x n
    A, B   <- base step with grad L(W')    the trained adapter goes down
    A2, B2 <- base step with -grad L(W')   the adversary goes up, at the same rate
    c      = sqrt(sum over layers ||s B2 A2||_F^2)
    if c > rho:  A2 <- sqrt(rho / c) A2,  B2 <- sqrt(rho / c) B2       so that what is added has the length rho

Liu, Li, Huang, Yang, Huang: "Bi-LoRA: Efficient Sharpness-Aware Minimization for Fine-Tuning Large-Scale Models", ICLR
2026, arXiv 2508.19564. The adversary is no part of the model: evaluation, probes, averages and exports are without it
(`engine.averaged("bi_lora")`, where its factors are 0), and checkpoints keep it. Rest point: rho = 0, where B2 stays 0
and all else is plain LoRA.

Differs from the paper in: 1. c counts peft's factor s = alpha / r, where the paper writes ||B2 A2||, so that rho is the
length of what is really added to the weights. Choices of this project: the s of the adversary is that of the trained
adapter, it begins as peft's do (B2 = 0), and it has no dropout; at rho = 0 its gradient is 0, not only its length.

The base clips the gradients of both by one norm, and its weight decay shrinks both.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from elastic_lsopt.by_name import require_count, require_number
from elastic_lsopt.errors import UserError
from elastic_lsopt.facts import Facts
from elastic_lsopt.optimizers.registry import register
from elastic_lsopt.oracle.method import State
from elastic_lsopt.oracle.oracle import Oracle
from elastic_lsopt.space.geometry import ParameterSpace
from elastic_lsopt.space.vector import Vector


@register("bi_lora")
@dataclass(frozen=True, kw_only=True)
class BiLoRA:
    """Cost: one pass, with the second adapter in it. Memory: the second adapter's weights, gradient and base state, as
    of any trained parameter; one gradient within the step; its factors whole on each rank while c is computed.

    Communication: one gather of the second adapter per step, and one refresh of the weights' copies where c > rho.
    Raises UserError for a value out of range, a model without the second adapter or with one of another rank, and a
    base that keeps the weights elsewhere (schedule_free).
    """

    r: int = 8
    """Rank of the second adapter; >= 1."""
    rho: float = 0.05
    """Greatest length of what it adds to the weights; >= 0. The paper: 0.01 to 0.1; 0.2 hurts."""

    facts: ClassVar[Facts] = Facts(
        paper="Liu, Li, Huang, Yang, Huang 2025, arXiv 2508.19564", memory="0; 1 within the step; a second adapter",
        communication="a gather of the second adapter", needs="adapters (lora:), and one called adversary",
    )  # fmt: skip
    parts = 1
    moves_adversary = True
    """`space.adversary` is made for it."""

    def __post_init__(self) -> None:
        require_count("r", self.r)
        require_number("rho", self.rho)

    def init(self, space: ParameterSpace) -> State:
        assert space.adversary is not None
        if other := sorted(space.adversary.ranks - {self.r}):
            raise UserError(
                f"the adapter 'adversary' has rank {other[0]} and bi_lora r={self.r}; give r={other[0]}, or make the "
                "adapter with that rank in all its layers."
            )
        return {}

    def gradient(self, space: ParameterSpace, oracle: Oracle, state: State) -> Vector:
        up = -1.0 if self.rho else 0.0
        return oracle.gradient().clone().mul_each_([up if factor else 1.0 for factor in _factors(space)])

    def settle(self, space: ParameterSpace, state: State) -> bool:
        """After the base's step: bring the adversary back to length rho; whether it was longer (collective)."""
        assert space.adversary is not None
        c = space.adversary.norm()
        if not c > self.rho:
            return False
        # 2 eps for the rounding of the factor and of the products, 1e-15 for that of the sums in c: never above rho.
        slack = 2 * max(torch.finfo(t.dtype).eps for t in space.weights.tensors) if space.weights.tensors else 0.0
        factor = math.sqrt(self.rho / c) * (1 - slack - 1e-15)
        _times(space, space.weights, factor)
        return True

    def point(self, space: ParameterSpace, weights: Vector) -> Vector:
        """The model without its adversary, where it is evaluated and exported."""
        return _times(space, weights.clone(), 0.0)


def _factors(space: ParameterSpace) -> list[bool]:
    assert space.adversary is not None
    return list(space.adversary.factors)


def _times(space: ParameterSpace, vector: Vector, factor: float) -> Vector:
    """The vector with its part of the adversary multiplied by a number, in place."""
    factors = _factors(space)
    for piece, t in zip(space.layout.pieces, vector.tensors, strict=True):
        if factors[piece.parameter]:
            t.mul_(factor) if factor else t.zero_()
    return vector
