"""What a rank keeps from step to step, in bytes by what it keeps: arithmetic only, no device and no model.

With P trainable parameters, N ranks that share one copy, c bytes a working weight (2 in bf16, else 4), and the
optimizer's s states a parameter (Adam 2, momentum 1):

                    weights   master   state     perturbed (SAM's way back)
    replicated      4 P       -        4 s P     4 P
    fsdp2           4 P/N     -        4 s P/N   4 P/N
    ZeRO stage 0    c P       bf16 4 P 4 s P     c P
    ZeRO stage 1, 2 c P       4 P/N    4 s P/N   none: rebuilt from the master
    ZeRO stage 3    c P/N     4 P/N    4 s P/N   none; it keeps its gradient too, c P/N

Frozen weights lie where the others lie, in their own type, and have neither master nor state. What of this is on the
host is said in `offload.py`.

Beside these a vector for methods that build a direction of their own. What a pass and a step take for a while is in
`transients.py`. An elastic job keeps versions of the state in host memory as well: `mirror_per_rank`.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil
from typing import Any

from elastic_lsopt.averages.lawa import LAWA
from elastic_lsopt.elastic.memory.budget import versions_within
from elastic_lsopt.training.estimate.placement import FP32, Placement

STATES = {
    "adahessian": 2, "adam": 2, "adamw": 2, "adaptive_memory": 2, "lamb": 2, "lars": 1, "muon": 1, "sassha": 2,
    "schedule_free": 2, "soap": 2, "sophia_g": 2, "sophia_h": 2, "nadam": 2, "radam": 2, "adamax": 2, "adadelta": 2,
    "rprop": 2, "adagrad": 1, "rmsprop": 1, "asgd": 1,
}  # fmt: skip
"""fp32 tensors of optimizer state per parameter; sgd: 1 with momentum, else 0. (Beside muon AdamW's are not
counted, nor what optim_args add: amsgrad, rmsprop's momentum; of updates with two forms the larger, adamw's.)"""

STAYS = ("none", "flat_lora", "bi_lora")
"""Methods that do not move the trained weights."""
DIRECTIONS = {
    "asam": 1, "gsam": 1, "friendly_sam": 1, "wsam": 1, "m_sam": 1, "sampa": 1, "rwp": 1, "entropy_sgd": 4,
    "bi_lora": 1,
}  # fmt: skip
"""Vectors that a method holds within a step, beside the way back; LPF-SGD draws its noise in blocks."""
REMEMBERED = {"looksam": 1, "friendly_sam": 1, "sampa": 1}
"""Vectors that a method keeps from step to step."""

METADATA_BYTES = 2**15
"""Of a version, for what is no tensor: the clock, cursors and random states, and gaps between tensors."""


def optimizer_states(parameters: int, at: Placement, *, optim: str, momentum: float, grams: int) -> int:
    """Elements of optimizer state on each rank; of soap, whose tensors lie whole on one rank each, on average.

    `grams` are the elements of its square matrices, of which there are two kinds.
    """
    states = STATES.get(optim, 1 if momentum else 0)
    if optim != "soap":
        return states * at.share(parameters)
    return ceil((states * parameters + 2 * grams) / (at.shards if at.shards > 1 else at.world))


def average_vectors(averages: Mapping[str, Mapping[str, Any]]) -> int:
    """Vectors that the averages of a job's settings keep; one of an average that is not ours."""
    kinds = [(given.get("import", name), given) for name, given in averages.items()]
    return sum(given.get("k", LAWA.k) if kind == "lawa" else 1 for kind, given in kinds)


def state_per_rank(
    parameters: int,
    at: Placement,
    *,
    frozen: int = 0,
    optim: str = "adamw",
    momentum: float = 0.0,
    method: str = "none",
    averages: int = 0,
    grams: int = 0,
    watched: int = 0,
) -> dict[str, int]:
    """Bytes on each rank, by what they are for; `parameters` counts trainable elements, `averages` and `watched` the
    Vectors of averages and of schedules that look at the weights or gradients.

    A method that is not ours is taken to displace as SAM does.
    """
    share, zero = at.share(parameters), at.stage if at.backend == "deepspeed" else None
    states = optimizer_states(parameters, at, optim=optim, momentum=momentum, grams=grams)
    whole = zero in (1, 2)
    rebuilt = whole or zero == 3 or (zero == 0 and at.bf16)
    return {
        "weights": at.working * (parameters if whole else share),
        "frozen weights": at.frozen * (frozen if whole else at.share(frozen)),
        "gradient buffer": at.working * share if zero == 3 else 0,
        "master weights": FP32 * share if rebuilt else 0,
        "optimizer state": FP32 * states,
        "averages of the weights": FP32 * averages * share,
        "what schedules watch": FP32 * watched * share,
        "way back of a perturbation": 0 if method in STAYS or rebuilt else at.working * share,
        "state of the method": FP32 * REMEMBERED.get(method, 0) * share,
        "direction of the method": FP32 * DIRECTIONS.get(method, 0) * share,
    }


def mirror_per_rank(
    parameters: int,
    at: Placement,
    *,
    optim: str = "adamw",
    momentum: float = 0.0,
    grams: int = 0,
    vectors: int = 0,
    copies: int = 1,
    budget_bytes: float = 0.0,
) -> dict[str, int]:
    """Most bytes of host memory on each rank of an elastic job: (own versions + mirrored peers' versions) x bytes of
    its state.

    Its state is fp32: master weights, the optimizer's states, and `vectors` more: averages, the gain's. A rank holds
    the versions of `copies` others, its mirrored peers, as far as fewer than copies + 1 ranks hold that part of the
    state anyway: none where the weights are replicated. (Nodes are taken to have equally many ranks.) How many versions
    there are at most follows from `budget_bytes`, elastic.mirror_gib: trail.py, [Note: the bound].
    """
    share = at.share(parameters)
    kept = optimizer_states(parameters, at, optim=optim, momentum=momentum, grams=grams)
    state = FP32 * (share * (1 + vectors) + kept) + METADATA_BYTES
    holders = at.replicas if share < parameters else at.world
    mirrored_peers = min(max(0, copies + 1 - holders), max(0, at.world - holders))
    versions = versions_within(budget_bytes, (1 + mirrored_peers) * state)
    return {"own versions": versions * state, "mirrored peers' versions": versions * mirrored_peers * state}
