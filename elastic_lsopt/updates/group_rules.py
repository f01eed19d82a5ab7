"""Which update a param group means, and what of it stands in the group.

A rule is an `Update` (its class, where all of its hyper-parameters stand in the group) or a class of torch.optim.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from functools import partial
from typing import Any, TypeGuard, TypeVar, cast, get_args

import torch

from elastic_lsopt.by_name import built
from elastic_lsopt.errors import UserError
from elastic_lsopt.oracle.observation import Sees, Where
from elastic_lsopt.updates.registry import updates
from elastic_lsopt.updates.torch_update import ELEMENT_WISE
from elastic_lsopt.updates.update import Update

U = TypeVar("U", Update, type[Update])
Rule = Update | type[Update] | type[torch.optim.Optimizer]
OF_EVERY_GROUP = frozenset({"params", "param_names", "lr", "weight_decay"})
DECOUPLED = "decoupled_weight_decay"
"""The entry by which torch, and so we, say that decay acts on the weights and not through the gradient."""


def resolved(update: Any) -> Rule:
    """The rule that is meant. Raises UserError for one that is not known, does not work element by element, or looks
    at what it does not say."""
    if isinstance(update, Update):
        return seeing(update)
    if isinstance(update, str):
        torchs = {n.lower(): c for n, c in vars(torch.optim).items() if isinstance(c, type)}
        if update.lower() in updates.names() or ":" in update or update.lower() not in torchs:
            update = updates.get(update.lower() if ":" not in update else update)
        else:
            update = torchs[update.lower()]
    if isinstance(update, type) and issubclass(update, Update):
        return seeing(update if is_dataclass(update) else built("update", updates.name_of(update), update, {}))
    if is_torch(update):
        if update is torch.optim.Muon:
            raise UserError(
                "torch's Muon makes a shard orthogonal, not the matrix that it is a part of; use 'muon', ours, which "
                "brings each matrix together."
            )
        if update not in ELEMENT_WISE:
            known = ", ".join(sorted(c.__name__ for c in ELEMENT_WISE))
            raise UserError(
                f"update {update.__name__} may not work element by element; beside ours there are: {known}."
            )
        return update
    raise UserError(
        f"update={update!r} is neither an Update (one of {', '.join(updates.names())}, or your own) nor a class of "
        "torch.optim; give one."
    )


def seeing(rule: U) -> U:
    """The rule itself. Raises UserError for one that looks at what there is not, or does nothing with what it sees."""
    kind = rule if isinstance(rule, type) else type(rule)
    name = f"update {updates.name_of(kind)!r} ({kind.__qualname__})"
    for field, known in (("sees", get_args(Sees)), ("where", get_args(Where))):
        if (said := getattr(rule, field)) not in known:
            raise UserError(f"{name}: {field}={said!r} must be one of {', '.join(known)}.")
    if rule.sees != "nothing" and kind.observe is Update.observe:
        raise UserError(
            f"{name} sees {rule.sees!r} and must define observe(space, seen, state), which is told of it: see "
            "docs/own-update.md; or leave `sees` out."
        )
    return rule


def is_torch(rule: Any) -> TypeGuard[type[torch.optim.Optimizer]]:
    """Whether it is a class of torch optimizers."""
    return isinstance(rule, type) and issubclass(rule, torch.optim.Optimizer)


def refuse_decay(rule: Rule, decay: float) -> None:
    """Raise UserError for a weight decay that a class of torch.optim would not look at."""
    if decay and is_torch(rule) and "weight_decay" not in inspect.signature(rule).parameters:
        raise UserError(f"{name_of(rule)} has no weight decay, but weight_decay={decay:g}; set it to 0.")


def name_of(rule: Rule) -> str:
    """What messages, param groups and files call it."""
    if is_torch(rule):
        return rule.__name__.lower()
    return updates.name_of(type(rule) if isinstance(rule, Update) else rule)


def known_entries(rule: Rule) -> list[str]:
    """The names of its hyper-parameters beside lr and weight decay."""
    if is_torch(rule):
        return [k for k in _of_torch(rule, {}) if k in inspect.signature(rule).parameters]
    return [f.name for f in fields(rule)] if is_dataclass(rule) else []


def entries(rule: Rule, said: Mapping[str, Any]) -> dict[str, Any]:
    """What of it a param group holds, `said` before its own values. Raises UserError for a value out of range."""
    if is_torch(rule):
        return _of_torch(rule, said)
    made = now(rule, said) if isinstance(rule, Update) else built("update", name_of(rule), rule, said)
    assert isinstance(made, Update)
    own = {f.name: getattr(made, f.name) for f in fields(made)} if is_dataclass(made) else {}
    return {**own, DECOUPLED: made.decoupled_weight_decay}


def now(rule: Rule, group: Mapping[str, Any]) -> Update | type[torch.optim.Optimizer]:
    """The rule with the hyper-parameters that its param group says now."""
    if is_torch(rule):
        return rule
    said = {name: group[name] for name in known_entries(rule) if name in group}
    if isinstance(rule, Update) and not said:
        return rule
    make: Any = rule if isinstance(rule, type) else partial(replace, cast(Any, rule))
    try:
        return make(**said)
    except (TypeError, ValueError) as error:
        raise UserError(f"update {name_of(rule)!r}: {error}") from None


def _of_torch(kind: type[torch.optim.Optimizer], said: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a group of this class, by the class itself."""
    try:
        [group] = kind([torch.zeros(1)], lr=0.1, **said).param_groups  # type: ignore[call-arg]
    except (TypeError, ValueError) as error:
        raise UserError(f"update {kind.__name__.lower()!r}: {error}") from None
    return {key: value for key, value in group.items() if key not in OF_EVERY_GROUP}
