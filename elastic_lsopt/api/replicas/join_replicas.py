"""Replicas in a training loop of the user's own, under torchrun, the deepspeed launcher or MPI."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from elastic_lsopt.api.replicas.consensus import Consensus
from elastic_lsopt.backends.groups import form_replicas
from elastic_lsopt.consensus import registry
from elastic_lsopt.errors import UserError

LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def join_replicas(
    rule: str, *, replicas: int, bits: int = 32, top_k: int | None = None, exchange_timeout_s: float = 30.0,
    timeout: timedelta = timedelta(minutes=30), **hyperparameters: Any,
) -> Consensus:  # fmt: skip
    """Part the launched ranks into replicas, in order, and form this one's as torch's default group (collective).

    Call it in place of `init_process_group`. From then on torch's world is the replica: wrap the model in DDP or
    `fully_shard`, or call `lso.initialize`, as ever; give the engine what this returns as `consensus=`, and each
    replica samples of its own (`consensus.number` of `consensus.replicas` is this one). Raises UserError where no
    launcher's variables are there, where `replicas` does not divide the ranks, and for a rule or value that is wrong.
    """
    made = registry.build(rule, **hyperparameters)
    if missing := [name for name in LAUNCHED if name not in os.environ]:
        raise UserError(
            f"join_replicas needs what a launcher sets, and {', '.join(missing)} is missing; start the program by "
            "torchrun, deepspeed or mpirun."
        )
    if dist.is_initialized():
        raise UserError("join_replicas forms torch's default group, and there is one; call it before anything does.")
    size = int(os.environ["WORLD_SIZE"])
    if replicas < 2 or size % replicas:
        raise UserError(
            f"replicas={replicas} must be at least 2 and divide the {size} rank(s) of the job; start "
            f"{-(-size // max(2, replicas)) * max(2, replicas)} of them, or change replicas."
        )
    store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    form_replicas(
        dist.PrefixStore("replicas", store), rank, [size // replicas] * replicas, timeout, apart=True, backend=backend
    )
    return Consensus(
        made, dist.PrefixStore("meetings", store), replicas=tuple(range(replicas)), bits=bits, top_k=top_k,
        timeout_s=exchange_timeout_s,
    )  # fmt: skip
