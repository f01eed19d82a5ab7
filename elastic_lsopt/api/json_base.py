"""The base optimizer that a DeepSpeed JSON names: a class of torch.optim, or an update of ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from elastic_lsopt.errors import UserError
from elastic_lsopt.optimizers import registry
from elastic_lsopt.updates.registry import updates
from elastic_lsopt.updates.update_optimizer import UpdateOptimizer
from elastic_lsopt.updates.whole_matrices import muon_beside_adamw, not_for_muon

Base = Callable[[Any], torch.optim.Optimizer]
Json = dict[str, Any]

# Of DeepSpeed's own Adam, without meaning for torch's.
ONLY_DEEPSPEED = ("torch_adam", "adam_w_mode", "fp32_optimizer_states", "fused")


def base_of(block: Json | None, model: nn.Module) -> Base:
    """The base that a JSON's optimizer block names (DeepSpeed's "Adam" decouples weight decay: AdamW).

    Raises UserError where there is no block, no such class, or a parameter that the class does not take.
    """
    if not block or "type" not in block:
        raise UserError(
            "no base optimizer: pass base=lambda params: torch.optim.AdamW(params, lr=…), or an optimizer block in the "
            'JSON, {"type": "AdamW", "params": {"lr": …}}.'
        )
    wanted, params = str(block["type"]), dict(block.get("params") or {})
    known = {
        n.lower(): n
        for n, c in vars(torch.optim).items()
        if isinstance(c, type) and issubclass(c, torch.optim.Optimizer)
    }
    known.pop("optimizer", None)
    if wanted.lower() in updates.names():
        return _update(wanted.lower(), {k: v for k, v in params.items() if v != "auto"}, model)
    if wanted.lower() not in known:
        raise UserError(
            f"optimizer.type={wanted!r} is neither a method ({', '.join(registry.names())}) nor an update "
            f"({', '.join(updates.names())}) nor in torch.optim "
            f"({', '.join(sorted(known.values()))})."
        )
    kind = known[wanted.lower()]
    if kind == "Adam" and params.get("adam_w_mode", True):
        kind = "AdamW"
    for key, value in list(params.items()):
        if value == "auto" or key in ONLY_DEEPSPEED:
            del params[key]

    def make(parameters: Any) -> torch.optim.Optimizer:
        try:
            return getattr(torch.optim, kind)(parameters, **params)
        except (TypeError, ValueError) as error:
            raise UserError(f"optimizer.params={params!r} does not suit torch.optim.{kind}: {error}.") from error

    return make


def _update(name: str, params: Json, model: nn.Module) -> Base:
    """An update of all parameters; `muon` of the matrices that it suits, AdamW of the rest, as DeepSpeed's own."""
    tables = not_for_muon(model) if name == "muon" else frozenset()
    matrices = frozenset(
        id(p) for n, p in model.named_parameters() if len(getattr(p, "ds_shape", p.shape)) == 2 and n not in tables
    )

    def make(parameters: Any) -> torch.optim.Optimizer:
        try:
            if name != "muon":
                return UpdateOptimizer(parameters, name, **params)
            own = dict(params)
            lr = own.pop("lr", None)
            rates = own.pop("muon_lr", lr), own.pop("adam_lr", lr)
            if None in rates:
                raise UserError('optimizer.params has no "lr"; give one (or "muon_lr" and "adam_lr").')
            decay = {"weight_decay": own.pop("weight_decay", 0.0)}
            adamw = {k: own.pop(k) for k in ("betas", "eps") if k in own}
            return muon_beside_adamw(
                parameters, matrices, muon={"lr": rates[0], **decay, **own}, adamw={"lr": rates[1], **decay, **adamw}
            )
        except TypeError as error:
            raise UserError(f"optimizer.params={params!r} does not suit {name}: {error}.") from error

    return make
