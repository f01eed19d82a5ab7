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

from elastic_lsopt.elastic.memory.budget import versions_within
from elastic_lsopt.training.estimate.placement import FP32, Placement

STATES = {
    "adamw": 2, "adam": 2, "lamb": 2, "lars": 1, "muon": 1, "nadam": 2, "radam": 2, "adamax": 2, "adadelta": 2,
    "rprop": 2, "adagrad": 1, "rmsprop": 1, "asgd": 1,
}  # fmt: skip
"""fp32 tensors of optimizer state per parameter; sgd: 1 with momentum, else 0. (Beside muon AdamW's are not
counted, nor what optim_args add: amsgrad, rmsprop's momentum.)"""

STAYS = ("none", "flat_lora")
"""Methods that do not move the trained weights."""
DIRECTIONS = {"asam": 1}
"""Vectors that a method holds while perturbed, beside the way back; LPF-SGD draws its noise in blocks."""

METADATA_BYTES = 2**15
"""Of a version, for what is no tensor: the clock, cursors and random states, and gaps between tensors."""


def state_per_rank(
    parameters: int,
    at: Placement,
    *,
    frozen: int = 0,
    optim: str = "adamw",
    momentum: float = 0.0,
    method: str = "none",
    averages: int = 0,
) -> dict[str, int]:
    """Bytes on each rank, by what they are for; `parameters` counts trainable elements.

    A method that is not ours is taken to displace as SAM does.
    """
    share, zero = at.share(parameters), at.stage if at.backend == "deepspeed" else None
    states = STATES.get(optim, 1 if momentum else 0)
    whole = zero in (1, 2)
    rebuilt = whole or zero == 3 or (zero == 0 and at.bf16)
    return {
        "weights": at.working * (parameters if whole else share),
        "frozen weights": at.frozen * (frozen if whole else at.share(frozen)),
        "gradient buffer": at.working * share if zero == 3 else 0,
        "master weights": FP32 * share if rebuilt else 0,
        "optimizer state": FP32 * states * share,
        "averages of the weights": FP32 * averages * share,
        "way back of a perturbation": 0 if method in STAYS or rebuilt else at.working * share,
        "direction of the method": FP32 * DIRECTIONS.get(method, 0) * share,
    }


def mirror_per_rank(
    parameters: int,
    at: Placement,
    *,
    optim: str = "adamw",
    momentum: float = 0.0,
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
    state = FP32 * share * (1 + STATES.get(optim, 1 if momentum else 0) + vectors) + METADATA_BYTES
    holders = at.replicas if share < parameters else at.world
    mirrored_peers = min(max(0, copies + 1 - holders), max(0, at.world - holders))
    versions = versions_within(budget_bytes, (1 + mirrored_peers) * state)
    return {"own versions": versions * state, "mirrored peers' versions": versions * mirrored_peers * state}
