"""From the settings to a base optimizer: which parameter takes which update, at which rate and decay.

`optim` serves all parameters but those that a rule of `param_groups` takes; the first rule that matches counts. Weight
decay leaves vectors (biases, gains of norms) alone unless a rule says otherwise. Muon is for matrices that are neither
embeddings nor the output head; beside it the rest takes AdamW, at the same rate. One class of torch.optim for all
parameters steps as it is; all else is an `UpdateOptimizer`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from elastic_lsopt.by_name import nearest
from elastic_lsopt.config.settings import ADAMS, SettingError, TrainConfig
from elastic_lsopt.errors import UserError
from elastic_lsopt.updates import registry
from elastic_lsopt.updates.group_rules import Rule as Update
from elastic_lsopt.updates.group_rules import entries, is_torch, known_entries, refuse_decay, resolved
from elastic_lsopt.updates.param_groups import Rule, assign, unused
from elastic_lsopt.updates.torch_update import ELEMENT_WISE
from elastic_lsopt.updates.update_optimizer import UpdateOptimizer
from elastic_lsopt.updates.whole_matrices import not_for_muon

TORCH = {kind.__name__.lower(): kind for kind in sorted(ELEMENT_WISE, key=lambda kind: kind.__name__)}
FUSED = frozenset({torch.optim.Adam, torch.optim.AdamW})
"""Classes whose step torch has as one kernel, on a CPU too."""
CHOSEN = {"fused", "foreach", "capturable", "differentiable"}
"""Options of a job's own that say how such a class steps."""


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


def treatments(config: TrainConfig, dims: Mapping[str, int], tables: frozenset[str]) -> dict[str, Treatment]:
    """By parameter's name; `dims` are their numbers of dimensions, `tables` the names that no orthogonal step suits.

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
        if optim == "muon" and (count != 2 or name in tables):
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


def check_updates(config: TrainConfig) -> None:
    """Raise SettingError, before there is a model, for an update that is not known or does not take its arguments."""
    decay = config.weight_decay
    for key, optim, own, rate in [
        ("optim", config.optim, config.optim_args, decay),
        *(
            (f"param_groups[{i}]", g.get("optim", config.optim), g.get("optim_args", {}), g.get("weight_decay", decay))
            for i, g in enumerate(config.param_groups)
        ),
    ]:
        if not isinstance(own, Mapping):
            raise SettingError(key, f"{key}.optim_args={own!r} must be a mapping, such as {{trust: 0.01}}.")
        try:
            kind = _kind(optim)
            for name in own:
                if is_torch(kind) and name not in known_entries(kind):
                    raise UserError(
                        f"update {optim!r} has no hyper-parameter {name!r}; it has: {', '.join(known_entries(kind))}"
                    )
            said = tuple((k, tuple(v) if isinstance(v, list) else v) for k, v in own.items())
            entries(kind, _options(config, Treatment(optim, said, 0.0, rate)))
            refuse_decay(kind, rate)
        except UserError as error:
            raise SettingError(key.partition("[")[0], f"{key}: {error}") from None


def base_of(config: TrainConfig, model: nn.Module) -> Callable[[Any], torch.optim.Optimizer]:
    """The base optimizer over given parameters of the model, whose names and shapes are read now: ZeRO-3 flattens the
    parameters before it asks for an optimizer, FSDP2 replaces them.

    Raises SettingError for an update that is not known or does not take its arguments, or cannot stand beside others.
    """
    check_updates(config)
    trained = {name: p.dim() for name, p in model.named_parameters() if p.requires_grad}
    treated = treatments(config, trained, not_for_muon(model))
    kinds = {optim: _kind(optim) for optim in dict.fromkeys(t.optim for t in treated.values())}
    alone = next(iter(kinds.values()), None) if len(kinds) == 1 else None
    alone = None if alone is torch.optim.Rprop else alone  # which torch cannot step on DTensors, but on their pieces
    try:
        own = {t: {"update": kinds[t.optim], **_options(config, t)} for t in treated.values()}
        if alone is None or not is_torch(alone):
            kinds = {optim: resolved(kind) for optim, kind in kinds.items()}
    except UserError as error:
        raise SettingError("optim", str(error)) from None

    def build(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        names = {id(p): name for name, p in model.named_parameters()}
        groups: dict[Treatment, dict[str, Any]] = {}
        for p in parameters:
            if p.requires_grad:
                how = treated[names[id(p)]]
                group = {"params": [], "lr": how.learning_rate, "weight_decay": how.weight_decay, **own[how]}
                groups.setdefault(how, group)["params"].append(p)
        if alone is not None and is_torch(alone):
            plain = [{k: v for k, v in group.items() if k != "update"} for group in groups.values()]
            make, shared = cast(Any, alone), _options(config, next(iter(own)))
            real = not any(p.is_meta for group in plain for p in group["params"])  # nothing is stepped there
            if alone in FUSED and real and not CHOSEN & shared.keys():
                shared["fused"] = True  # a third of the time of torch's default on a CPU
            return make(plain, lr=config.learning_rate, **shared)  # what a class reads when it is made, and no group
        return UpdateOptimizer(list(groups.values()), lr=config.learning_rate)

    return build


def name_of_base(base: torch.optim.Optimizer | None) -> str:
    """What banners and pictures call it: AdamW, or muon and adamw."""
    if isinstance(base, UpdateOptimizer):
        return " and ".join(dict.fromkeys(str(group["update"]) for group in base.param_groups))
    return type(base).__name__


def _kind(optim: str) -> Update:
    """The class that `optim` names. Raises UserError for none."""
    if ":" not in optim and optim not in (known := [*TORCH, *registry.names()]):
        raise UserError(f"unknown optim {optim!r}{nearest(optim, known, 'Known')} (one of your own: module:Class).")
    found = TORCH[optim] if optim in TORCH else registry.get(optim)
    own = issubclass(found, torch.optim.Optimizer) and found is not torch.optim.Muon  # where it steps, it is tried
    return found if own else resolved(found)


def _options(config: TrainConfig, how: Treatment) -> dict[str, Any]:
    """The group's own hyper-parameters."""
    if how.optim == "sgd":
        return {"momentum": config.momentum, **dict(how.optim_args)}
    if how.optim in ADAMS:
        betas = (config.adam_beta1, config.adam_beta2)
        return {"betas": betas, "eps": config.adam_epsilon, **dict(how.optim_args)}
    return dict(how.optim_args)
