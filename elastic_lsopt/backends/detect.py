"""Which backend holds these parameters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from elastic_lsopt.backends.backend import Backend


def backend_for(
    model: Any,
    base: torch.optim.Optimizer | None = None,
    *,
    named_parameters: Iterable[tuple[str, nn.Parameter]] | None = None,
    max_grad_norm: float | None = None,
) -> Backend:
    """The backend for a module (plain, DDP, FSDP2), a DeepSpeed engine, or bare parameters (model=None).

    Raises Unsupported, with the list of what is supported, for anything else.
    """
    if type(model).__module__.startswith("deepspeed"):
        from elastic_lsopt.backends.zero.adapter import zero_backend

        return zero_backend(model)
    module = getattr(model, "module", model) if type(model).__name__ == "DistributedDataParallel" else model
    named = list(module.named_parameters() if named_parameters is None else named_parameters)
    sharded = hasattr(module, "reshard") or any(hasattr(p, "_local_tensor") for _, p in named)
    if sharded:
        from elastic_lsopt.backends.fsdp2 import FSDP2

        return FSDP2(named, base, model=model, max_grad_norm=max_grad_norm)
    from elastic_lsopt.backends.replicated import Replicated

    return Replicated(named, base, model=model, max_grad_norm=max_grad_norm)
