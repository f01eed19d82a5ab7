"""From the settings to a base optimizer: which parameter takes which update, at which rate and decay.

`optim` serves all parameters but those that a rule of `param_groups` takes; the first rule that matches counts. Weight
decay leaves vectors (biases, gains of norms) alone unless a rule says otherwise. Muon is for matrices that are neither
embeddings nor the output head; beside it the rest takes AdamW, at the same rate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from elastic_lsopt.config.settings import SettingError, TrainConfig
from elastic_lsopt.errors import UserError
from elastic_lsopt.updates import registry
from elastic_lsopt.updates.adapter import UpdateOptimizer
from elastic_lsopt.updates.param_groups import Rule, assign, unused
from elastic_lsopt.updates.update import Update

TORCH = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "sgd": torch.optim.SGD}


@dataclass(frozen=True)
class Treatment:
    """How some of the parameters are treated."""

    optim: str
    optim_args: tuple[tuple[str, Any], ...]
    learning_rate: float
    weight_decay: float


def rules_of(config: TrainConfig) -> list[Rule]:
    """The rules of `param_groups`, as the file says them."""
    return [
        Rule(
            (match,) if isinstance(match := group["match"], str) else tuple(match),
            group.get("dims"),
            tuple((key, value) for key, value in group.items() if key not in ("match", "dims")),
        )
        for group in config.param_groups
    ]


def treatments(config: TrainConfig, dims: Mapping[str, int], not_for_muon: frozenset[str]) -> dict[str, Treatment]:
    """By parameter's name; `dims` are their numbers of dimensions.

    Raises SettingError for a rule that no parameter takes.
    """
    rules = rules_of(config)
    for rule in unused(dims.items(), rules):
        raise SettingError(
            "param_groups",
            f"param_groups: no parameter takes the rule {list(rule.match)}"
            + (f" with dims={rule.dims}" if rule.dims is not None else "")
            + f"; names are such as {next(iter(dims), '?')!r}, and the first rule that matches counts.",
        )
    out = {}
    for (name, count), number in zip(dims.items(), assign(dims.items(), rules), strict=True):
        said = dict(rules[number].options) if number is not None else {}
        optim = said.get("optim", config.optim)
        own = said.get("optim_args", config.optim_args if optim == config.optim else {})
        if optim == "muon" and (count != 2 or name in not_for_muon):
            optim, own = "adamw", {}
        decay = said.get("weight_decay", config.weight_decay if count > 1 else 0.0)
        rate = said.get("learning_rate", config.learning_rate)
        out[name] = Treatment(
            optim,
            tuple((k, tuple(v) if isinstance(v, list) else v) for k, v in sorted(own.items())),
            float(rate),
            float(decay),
        )
    return out


def base_of(config: TrainConfig, model: nn.Module) -> Callable[[Any], torch.optim.Optimizer]:
    """The base optimizer over given parameters of the model, whose names and shapes are read now: ZeRO-3 flattens the
    parameters before it asks for an optimizer, FSDP2 replaces them.

    Raises SettingError for an update that is not known or does not take its arguments.
    """
    trained = {name: p.dim() for name, p in model.named_parameters() if p.requires_grad}
    treated = treatments(config, trained, embeddings(model))
    ours = any(t.optim not in TORCH for t in treated.values()) or len({t.optim for t in treated.values()}) > 1
    updates = {t: _update(config, t) for t in set(treated.values())} if ours else {}

    def build(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        names = {id(p): name for name, p in model.named_parameters()}
        groups: dict[Treatment, dict[str, Any]] = {}
        for p in parameters:
            if p.requires_grad:
                how = treated[names[id(p)]]
                own = {"update": updates[how]} if ours else {}
                group = {"params": [], "lr": how.learning_rate, "weight_decay": how.weight_decay, **own}
                groups.setdefault(how, group)["params"].append(p)
        if ours:
            return UpdateOptimizer(list(groups.values()), lr=config.learning_rate)
        return TORCH[config.optim](
            list(groups.values()), lr=config.learning_rate, **_torch_options(config, config.optim)
        )

    return build


def embeddings(model: nn.Module) -> frozenset[str]:
    """The names of weights whose rows are looked up or are classes, which no orthogonal step suits."""
    found = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    ask = getattr(model, "get_output_embeddings", None)
    head = ask() if ask is not None else None
    found |= {id(p) for p in head.parameters()} if isinstance(head, nn.Module) else set()
    return frozenset(name for name, p in model.named_parameters() if id(p) in found)


def _torch_options(config: TrainConfig, optim: str) -> dict[str, Any]:
    if optim == "sgd":
        return {"momentum": config.momentum}
    return {"betas": (config.adam_beta1, config.adam_beta2), "eps": config.adam_epsilon}


def _update(config: TrainConfig, how: Treatment) -> Any:
    if how.optim in TORCH:
        return TORCH[how.optim], tuple(sorted(_torch_options(config, how.optim).items()))
    try:
        made = registry.build(how.optim, **dict(how.optim_args))
    except UserError as error:
        raise SettingError("optim", str(error)) from None
    if not isinstance(made, Update):
        raise SettingError("optim", f"optim={how.optim} makes a {type(made).__name__}; it must be an Update.")
    return made
