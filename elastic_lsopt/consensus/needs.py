"""What a rule of consensus cannot do without in each replica, refused in one line before the first step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from elastic_lsopt.consensus.registry import rules
from elastic_lsopt.consensus.rule import Rule
from elastic_lsopt.errors import UserError


def refuse_unmet(
    rule: Rule, method: str, base: torch.optim.Optimizer | None, *, bits: int = 32, top_k: int | None = None
) -> None:
    """Raise UserError where the replicas' method, their base or the format of exchanges is not what the rule needs.

    `method`: its name in the registry. `top_k`: how many of each chunk an exchange tells (None: all).
    """
    name = rules.name_of(type(rule))
    if rule.needs_method not in ("", method):
        raise UserError(
            f"rule of consensus {name} needs the method {rule.needs_method}, and the method is {method}; set "
            f"landscape: {{method: {rule.needs_method}}}, or take the rule easgd, which any method suits."
        )
    groups = base.param_groups if base is not None else []
    if rule.needs_update and not any(group.get("update") == rule.needs_update for group in groups):
        raise UserError(
            f"rule of consensus {name} needs the update {rule.needs_update}, and the base is {_called(base)}; set "
            f"optim: {rule.needs_update}, or take the rule diloco, which any base suits."
        )
    if rule.needs_momentum and (still := next((g for g in groups if not _has_momentum(g)), None)) is not None:
        called = still.get("update", _called(base))
        raise UserError(
            f"rule of consensus {name} needs a base with momentum, and the base is {called}"
            f"{' with momentum=0' if 'momentum' in still else ''}; set "
            "momentum: 0.9, or take the rule easgd, which any base suits."
        )
    if rule.needs_top_k and top_k is None:
        raise UserError(
            f"rule of consensus {name} tells the largest parts alone, and this exchange tells all; set exchange: "
            "{top_k: 64, bits: 2}, or take the rule diloco."
        )
    if not rule.in_few_bits and (bits < 32 or top_k is not None):
        told = f"top_k={top_k}" if top_k is not None else f"bits={bits}"
        raise UserError(
            f"rule of consensus {name} sends replicas' own points, which are not rounded, and exchange has {told}; "
            "leave it out (bits: 32)."
        )


def _has_momentum(group: Mapping[str, Any]) -> bool:
    return bool(group.get("momentum")) or "betas" in group


def _called(base: torch.optim.Optimizer | None) -> str:
    if base is None:
        return "none"
    updates = dict.fromkeys(group["update"] for group in base.param_groups if "update" in group)
    return " beside ".join(updates) or type(base).__name__
