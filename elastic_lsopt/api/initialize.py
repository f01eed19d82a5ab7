"""The face for DeepSpeed: a drop-in for `deepspeed.initialize` whose engine takes landscape-aware steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from elastic_lsopt.api.engine import Engine
from elastic_lsopt.api.json_base import Base, base_of
from elastic_lsopt.api.replicas.consensus import Consensus
from elastic_lsopt.backends.backend import Backend
from elastic_lsopt.config.deepspeed_json import engine_json, read_deepspeed_json, split_method
from elastic_lsopt.errors import UserError
from elastic_lsopt.optimizers import registry
from elastic_lsopt.oracle.family import Stateful
from elastic_lsopt.oracle.losses.loss import Loss, LossFunction
from elastic_lsopt.oracle.method import Method

Json = dict[str, Any]


def initialize(
    *,
    model: nn.Module,
    config: str | Path | Json,
    method: Method | None = None,
    base: Base | None = None,
    loss_fn: Loss | LossFunction | None = None,
    seed: int = 0,
    total_samples: int | None = None,
    max_grad_norm: float | None = None,
    keep: Sequence[Stateful] = (),
    fill: Callable[[Backend], None] | None = None,
    consensus: Consensus | None = None,
) -> Engine:
    """A DeepSpeed engine whose `train_batch(microbatches)` is one landscape-aware step (collective).

    `config` is a DeepSpeed JSON (a path or a dict). The method is `method`, or `optimizer: {type: sam, params: {rho,
    base: {type: AdamW, params: …}}}` in the JSON, else none. `base` makes the torch optimizer from the parameters; else
    the JSON's optimizer names a class of torch.optim or an update (lars, lamb, muon). `max_grad_norm` is the limit of
    the global L2 norm of the gradient (0: none; default: the JSON's `gradient_clipping`, else none). Batch sizes in the
    JSON are not read. `fill` gives the weights of a model on the meta device their values, in the shards that this rank
    holds by then (checkpoint/huggingface).

    Raises UserError for what contradicts itself or is missing (the package deepspeed too), Unsupported for what is not
    tested or cannot be right: fp16, NVMe, other kinds of parallelism, a base that needs whole parameters …
    """
    given, name, hyperparameters = split_method(read_deepspeed_json(config), registry.names())
    block = hyperparameters.pop("base", None) if name else given.pop("optimizer", None)
    if name and method is not None:
        raise UserError(f"the method is given twice, by method={method!r} and as {name!r} in the JSON; remove one.")
    chosen = registry.build(name or "none", **hyperparameters) if method is None else method
    if base is None:
        base = base_of(block, model)
    elif block is not None:
        raise UserError(f"the base is given twice, by base=… and as {block.get('type')!r} in the JSON; remove one.")
    try:
        from elastic_lsopt.backends.zero.start import start_distributed, start_engine
    except ModuleNotFoundError as error:
        if error.name != "deepspeed":
            raise
        raise UserError("lso.initialize needs DeepSpeed, which is not installed: pip install deepspeed.") from None
    limit = clipping(given.get("gradient_clipping"), max_grad_norm)
    bf16 = bool(given.get("bf16", {}).get("enabled", False))
    given = engine_json(given, world=start_distributed(), max_grad_norm=limit, bf16=bf16)
    backend = start_engine(model, base, given, fill)
    return Engine(
        backend, chosen, loss_fn=loss_fn, seed=seed, total_samples=total_samples, keep=keep, consensus=consensus
    )


def clipping(in_json: Any, argument: float | None) -> float:
    """The limit of the gradient's norm, 0 for none. Raises UserError for a value out of range or two that differ."""
    if in_json in (None, "auto"):
        limit = argument or 0.0
    elif argument not in (None, in_json):
        raise UserError(f"max_grad_norm={argument} and gradient_clipping={in_json} in the JSON differ; remove one.")
    else:
        limit = in_json
    if isinstance(limit, bool) or not isinstance(limit, int | float) or not 0 <= limit < float("inf"):
        raise UserError(f"gradient_clipping={limit!r} must be a number >= 0 (0: none).")
    return float(limit)
