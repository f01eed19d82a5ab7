"""Start DeepSpeed: process group and engine, without the defaults of its that cost a minute or change a number."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError
from pydantic import ValidationError
from torch import nn

from elastic_lsopt.backends.trainable import refuse_scalars, trainable
from elastic_lsopt.backends.zero.adapter import zero_backend
from elastic_lsopt.backends.zero.tested import refuse_untested
from elastic_lsopt.backends.zero.zero_backend import ZeroBackend, check_version
from elastic_lsopt.errors import UserError
from elastic_lsopt.updates.update_optimizer import updates_of

# Set by the launchers whose environment DeepSpeed reads (the second by Open MPI).
LAUNCHED = ("RANK", "OMPI_COMM_WORLD_SIZE")


def start_distributed() -> int:
    """Bring up the process group where there is none; returns the world size (1 without a launcher)."""
    check_version()
    logger = logging.getLogger("DeepSpeed")
    logger.setLevel(logging.WARNING)
    logger.addFilter(_tested)
    # Else DeepSpeed compiles a C++ all-reduce for one host at start: a minute, and a lock file that outlives a kill.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    os.environ.setdefault("LOCAL_RANK", "0")
    if not dist.is_initialized() and not any(name in os.environ for name in LAUNCHED):
        accelerator: Any = get_accelerator()
        backend = accelerator.communication_backend_name()
        dist.init_process_group("gloo" if backend == "ccl" else backend, store=dist.HashStore(), rank=0, world_size=1)
    deepspeed.init_distributed(verbose=False)
    return dist.get_world_size()


def _tested(record: logging.LogRecord) -> bool:
    """Drop DeepSpeed's advice of caution with an optimizer that is not on its list: the laws test it."""
    return "untested optimizer" not in str(record.msg)


def _shard(model: nn.Module, config: dict[str, Any]) -> None:
    """Cut the model into ZeRO-3's shards, one parameter after the other: no device ever holds more than its shards and
    one of them. By itself `deepspeed.initialize` puts the whole model there first. Collective."""
    device = get_accelerator().current_device_name()  # type: ignore[attr-defined]
    for module in model.modules():
        module._buffers.update({k: b if b is None else b.to(device) for k, b in module._buffers.items()})
    if any(p.is_meta for p in model.parameters()):
        _shard_without_values(model, config, device)
        return
    if (config.get("bf16") or {}).get("enabled"):
        own = [dict(module._buffers) for module in model.modules()]
        model.bfloat16()
        for module, buffers in zip(model.modules(), own, strict=True):
            module._buffers.update(buffers)  # which DeepSpeed leaves in their type
    deepspeed.zero.Init(module=model, config_dict_or_path=config)


def _shard_without_values(model: nn.Module, config: dict[str, Any], device: str) -> None:
    """The same for a model without memory: each parameter gets some that is never written, is cut, and lets go of it.

    DeepSpeed's own way would send rank 0's values to all.
    """
    cutter = deepspeed.zero.Init(config_dict_or_path=config)
    bf16 = (config.get("bf16") or {}).get("enabled")
    done: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for key, p in module._parameters.items():
            if p is None:
                continue
            if id(p) not in done:  # a tied one is cut once
                dtype = torch.bfloat16 if bf16 and p.is_floating_point() else p.dtype
                whole = nn.Parameter(torch.empty(p.shape, dtype=dtype, device=device), p.requires_grad)
                cutter._convert_to_deepspeed_param(whole)
                whole.partition()  # type: ignore[attr-defined]
                done[id(p)] = whole
            module._parameters[key] = done[id(p)]


def start_engine(
    model: nn.Module,
    base: Callable[[Any], torch.optim.Optimizer],
    config: dict[str, Any],
    fill: Callable[[ZeroBackend], None] | None = None,
) -> ZeroBackend:
    """`deepspeed.initialize` and the adapter for its engine (collective). `config` is the whole DeepSpeed JSON.

    A model on the meta device is taken where `fill` gives its weights their values; at stage 3 no rank then ever holds
    more than its shards and one parameter.

    Raises Unsupported before DeepSpeed starts for a JSON that is not tested, UserError where `base` gives no torch
    optimizer.
    """
    refuse_untested(config)
    refuse_scalars(model.named_parameters(), "DeepSpeed")
    try:
        DeepSpeedConfig(config)
    except (ValueError, AssertionError, DeepSpeedConfigError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else None
        what = f"{first['loc'][-1]}={first['input']!r}: {first['msg']}" if first else " ".join(str(error).split())
        raise UserError(f"DeepSpeed refuses the JSON: {what}") from error

    def made(params: Any) -> torch.optim.Optimizer:
        optimizer = base(params)
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise UserError(f"base gave a {type(optimizer).__name__}; it takes parameters and gives a torch optimizer.")
        if (update := updates_of(optimizer)) is not None:
            update.steps_elsewhere = True  # DeepSpeed calls step() once while it starts, to make room for state
        return optimizer

    if fill is None:
        trainable(model.named_parameters())
    whole = not any(hasattr(p, "ds_id") for p in model.parameters())  # else the user's zero.Init has cut it already
    if (config.get("zero_optimization") or {}).get("stage") == 3 and whole:
        _shard(model, config)
    parameters: Any = [p for _, p in trainable(model.named_parameters())]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        engine, *_ = deepspeed.initialize(model=model, model_parameters=parameters, optimizer=made, config=config)
    backend = zero_backend(engine)
    if fill is not None:
        fill(backend)
    return backend
