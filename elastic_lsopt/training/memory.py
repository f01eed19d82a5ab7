"""What a rank's parameters cost in bytes, by what it keeps: arithmetic only, no device and no model.

With P trainable parameters, N ranks that share one copy, c bytes a working weight (2 in bf16, else 4), and the
optimizer's s states a parameter (Adam 2, momentum 1):

                    weights   gradient   master   state     perturbed (SAM's way back)
    replicated      4 P       4 P        -        4 s P     4 P
    fsdp2           4 P/N     4 P/N      -        4 s P/N   4 P/N
    ZeRO stage 0    c P       c P        bf16 4 P 4 s P     c P
    ZeRO stage 1    c P       c P        4 P/N    4 s P/N   none: rebuilt from the master
    ZeRO stage 2    c P       c P/N      4 P/N    4 s P/N   none
    ZeRO stage 3    c P/N     c P/N      as bf16: 4 P/N, fp32: none     bf16 none, fp32 4 P/N

Beside these: the working copies that a forward gathers (or casts, in bf16 on replicated weights), and a vector for
methods that build a direction of their own. Activations, communication buckets and the framework are not in it.

An elastic job keeps versions of the state in host memory as well: `mirror_per_rank`.
"""

from math import ceil

from elastic_lsopt.elastic.memory.budget import versions_within

STATES = {"adamw": 2, "adam": 2, "lamb": 2, "lars": 1, "muon": 1}
"""fp32 tensors of optimizer state per parameter; sgd: 1 with momentum, else 0. (Beside muon AdamW's are not
counted.)"""

DIRECTIONS = {"asam": 1}
"""Vectors that a method holds while perturbed, beside the way back; LPF-SGD draws its noise in blocks."""

METADATA_BYTES = 2**15
"""Of a version, for what is no tensor: the clock, cursors and random states, and gaps between tensors."""


def memory_per_rank(
    parameters: int,
    *,
    backend: str,
    world: int,
    stage: int = 0,
    bf16: bool = False,
    optim: str = "adamw",
    momentum: float = 0.0,
    method: str = "none",
    gathered: int = 0,
    replicas: int = 1,
    averages: int = 0,
) -> dict[str, int]:
    """Bytes on each rank, by what they are for; the sum is the peak that the parameters cause.

    `parameters` counts trainable elements; `backend` is replicated, fsdp2 or deepspeed (then `stage` is 0 to 3);
    `gathered` counts the elements that are whole at once under fsdp2 and stage 3; `replicas` is the number of HSDP
    replica groups, which must divide `world`. A method that is not ours is taken to displace as SAM does.
    """
    share = _share(parameters, backend, world, stage, replicas)
    zero = stage if backend == "deepspeed" else None
    working = 2 if bf16 and zero is not None else 4  # replicated and fsdp2 keep fp32 weights and cast
    compute = 2 if bf16 else 4
    states = STATES.get(optim, 1 if momentum else 0)

    weights = working * (parameters if zero in (1, 2) else share)
    master = 4 * share if zero in (1, 2) or (zero is not None and bf16) else 0
    if backend == "fsdp2" or zero == 3:
        copies = compute * min(gathered, parameters)
    else:
        copies = compute * parameters if backend == "replicated" and bf16 else 0
    way_back = 0 if method == "none" or zero in (1, 2) or (zero == 3 and bf16) else working * share
    return {
        "weights": weights,
        "gathered or cast copies": copies,
        "gradient": working * (parameters if zero == 1 else share),
        "master weights": master,
        "optimizer state": 4 * states * share,
        "averages of the weights": 4 * averages * share,
        "way back of a perturbation": way_back,
        "direction of the method": 4 * DIRECTIONS.get(method, 0) * share,
    }


def mirror_per_rank(
    parameters: int,
    *,
    backend: str,
    world: int,
    stage: int = 0,
    optim: str = "adamw",
    momentum: float = 0.0,
    vectors: int = 0,
    copies: int = 1,
    replicas: int = 1,
    budget_bytes: float = 0.0,
) -> dict[str, int]:
    """Most bytes of host memory on each rank of an elastic job: (own versions + mirrored peers' versions) x bytes of
    its state.

    Its state is fp32: master weights, the optimizer's states, and `vectors` more: averages, the gain's. A rank holds
    the versions of `copies` others, its mirrored peers, as far as fewer than copies + 1 ranks hold that part of the
    state anyway: none where the weights are replicated. (Nodes are taken to have equally many ranks.) How many versions
    there are at most follows from `budget_bytes`, elastic.mirror_gib: trail.py, [Note: the bound].
    """
    share = _share(parameters, backend, world, stage, replicas)
    state = 4 * share * (1 + STATES.get(optim, 1 if momentum else 0) + vectors) + METADATA_BYTES
    holders = replicas if share < parameters else world
    mirrored_peers = min(max(0, copies + 1 - holders), max(0, world - holders))
    versions = versions_within(budget_bytes, (1 + mirrored_peers) * state)
    return {"own versions": versions * state, "mirrored peers' versions": versions * mirrored_peers * state}


def _share(parameters: int, backend: str, world: int, stage: int, replicas: int) -> int:
    """The elements whose masters and optimizer state this rank keeps."""
    sharded = backend == "fsdp2" or (backend == "deepspeed" and stage > 0)
    return ceil(parameters * replicas / world) if sharded else parameters
