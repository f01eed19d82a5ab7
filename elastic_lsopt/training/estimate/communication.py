"""Bytes that a rank sends in one optimizer step, by collective. Pure arithmetic.

A ring: to gather or to reduce-scatter S bytes over N ranks, each sends S (N - 1) / N; an all-reduce is both. With P
elements, c bytes a weight in the forward, a micro-batches per rank and pass, and the
method's p passes with m moves of the weights:

    replicated   gradients   p x 2 x 4 P                                reduced once per pass
    fsdp2        weights     p a x 2 c P                                forward, and again in the backward
                 gradients   p a x r P, r = 4                           and 2 x 4 P / N over the replicas of HSDP
    in halves    gradients   2 x 4 P (N/2 - 1) / (N/2) + 4 P            SAMPa's two passes at once
    ZeRO 0       gradients   p x 2 x c P
    ZeRO 1       gradients   p x 2 x c P        weights   (1 + m) x c P      after the step, and after each move
    ZeRO 2       gradients   p a x 2 x c P      weights   (1 + m) x c P      its buckets are all-reduced
    ZeRO 3       weights     p a x c (2 P - kept from the forward to the backward), of those that are not small;
                             (1 + m) x c of the small, which stay whole
                 gradients   p a x c P

Frozen weights are gathered with the others, and never reduced (ZeRO-3 gathers a frozen embedding once, for the
forward). Flat-LoRA gathers the adapters' masters once a step; Bi-LoRA those of its adversary alone, counted as if it
were all of them, and moves the weights where it is too long. Small all-reduces (losses, norms, votes) are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from elastic_lsopt.training.estimate.placement import FP32, Placement
from elastic_lsopt.training.estimate.size import ModelSize
from elastic_lsopt.training.estimate.transients import always_whole, kept_for_backward


@dataclass(frozen=True)
class Passes:
    """What a method asks for in a step, on average."""

    gradients: float = 1.0
    """Passes over the batch, each with its reduction of gradients."""
    moves: float = 0.0
    """Moves of the weights."""
    gathers: float = 0.0
    """Gathers of all trained weights."""
    halves: bool = False
    """Two of the passes are taken at once, each by one half of the ranks."""

    @property
    def in_turn(self) -> float:
        """Passes of a rank, one after the other."""
        return self.gradients - self.halves

    @classmethod
    def of(cls, method: str, fields: Mapping[str, Any]) -> Passes:
        """Of a method of ours by its name; one that is not known is taken for SAM."""
        match method:
            case "none":
                return cls()
            case "flat_lora":
                return cls(gathers=1.0)
            case "bi_lora":
                return cls(moves=1.0, gathers=1.0)
            case "lpf_sgd":
                return cls(1.0, float(fields.get("parts", 8)))
            case "rwp":
                return cls(1.0, 1.0)
            case "entropy_sgd":
                steps = max(1, fields.get("inner_steps", 5))
                return cls(1.0 if fields.get("batch", "parts") == "parts" else float(steps), steps - 1.0)
            case "momentum_sam" | "random_sam":
                return cls(1.0, 1.0 / fields.get("every", 1))
            case "m_sam":
                every = fields.get("every", 1)
                return cls(1.0 + 1.0 / every, fields.get("parts", 4) / every)
            case "looksam":
                k = fields.get("k", 5)
                return cls(1.0 + 1.0 / k, 1.0 / k)
            case "sampa":
                return cls(2.0, 2.0, halves=fields.get("halves") is True)
            case _:
                every = fields.get("every", 1)
                return cls(1.0 + 1.0 / every, 1.0 / every)


def sent_per_step(size: ModelSize, at: Placement, *, microbatches: int, passes: Passes) -> dict[str, int]:
    """Bytes that each rank sends in a step: `weights` gathered and `gradients` reduced."""
    whole, trained, c = size.elements, size.parameters, at.compute
    ranks = at.shards if at.sharded else at.world
    ring = (ranks - 1) / ranks
    forwards, replicas = passes.gradients * microbatches, 0.0
    if at.backend == "fsdp2":
        reshard = at.reshard_after_forward
        again = ring if reshard is True else (reshard - 1) / reshard if reshard else 0.0
        weights = forwards * at.in_forward(size.whole) * (ring + again)
        gradients = forwards * FP32 * trained * ring
        replicas = 2 * forwards * FP32 * at.share(trained) * (at.replicas - 1) / at.replicas
    elif at.backend == "deepspeed" and at.stage == 3:
        always, kept = always_whole(size, at), kept_for_backward(size, at)
        gathered = whole - always
        gathered += max(0, gathered - kept - size.looked_up)
        weights = c * (forwards * gathered + (1 + passes.moves) * always) * ring
        gradients = forwards * c * trained * ring
    else:
        reductions = forwards if at.stage == 2 else passes.gradients
        weights = c * trained * (1 + passes.moves) * ring if at.sharded else 0.0
        gradients = 2 * reductions * (c if at.backend == "deepspeed" else FP32) * trained * ring
    if passes.halves:
        half = at.world // 2  # one all-reduce within it, and a message to the twin
        gradients = FP32 * trained * (2 * (half - 1) / half + 1)
    if at.sharded:
        weights += passes.gathers * FP32 * trained * ring
    return {"weights": round(weights), "gradients": round(gradients + replicas)}
