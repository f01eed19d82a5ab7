"""An update rule as the base optimizer that DeepSpeed, FSDP2, a scheduler and a launcher's JSON know how to hold.

    base = UpdateOptimizer(model.named_parameters(), LAMB(), lr=2e-3, weight_decay=0.01)
    base = UpdateOptimizer([{"params": matrices, "update": Muon(), "lr": 0.02}, {"params": rest}], "AdamW", lr=3e-4)

[Note: where it steps] A framework calls a base's `step()` once per flat partition, with the others empty, and a rule
that needs whole parameters cannot step there. So the step is made before, on the masters of all partitions at once
(`take`), and the framework's own call, which finds nothing to do, is what makes its copies right afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from elastic_lsopt.errors import UserError
from elastic_lsopt.oracle.family import Family, Kept, Stateful
from elastic_lsopt.oracle.method import State
from elastic_lsopt.space.geometry import ParameterSpace
from elastic_lsopt.space.vector import Vector
from elastic_lsopt.updates import registry
from elastic_lsopt.updates.torch_update import TorchFamily
from elastic_lsopt.updates.update import Rates, Update

FAMILY = "update/"


class UpdateFamily(Stateful):
    """What an update remembers, as a state family."""

    def __init__(self, update: Update, name: str) -> None:
        self.update, self.name = update, name

    def init(self, space: ParameterSpace) -> State:
        return self.update.init(space)


class UpdateOptimizer(torch.optim.Optimizer):
    """Param groups with an update each; `update` and the other arguments are the groups' defaults.

    An update is an `Update`, the name of one ("lamb"), or the name of a class of torch.optim that works element by
    element ("AdamW"). Steps inside an `Engine`, a `LandscapeOptimizer` or `lso.initialize` only. Raises UserError for
    an update that is not known.
    """

    def __init__(
        self, params: Any, update: Update | str = "lamb", *, lr: float, weight_decay: float = 0.0, **options: Any
    ) -> None:
        self._by_id: dict[int, int] = {}
        self._bound: list[tuple[Kept | TorchFamily, list[int]]] = []
        self.steps_elsewhere = False
        """A framework calls `step()` after `take()`; see the note above."""
        self._options = tuple(options)
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "update": update, **options})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        group["update"] = rule = resolved(group["update"], {k: group[k] for k in self._options})
        if isinstance(rule, Update) and is_dataclass(rule):
            group.update({f.name: getattr(rule, f.name) for f in fields(rule)})
        self._by_id.update({id(p): len(self.param_groups) - 1 for p in group["params"]})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """What a framework calls after `take`. Raises UserError where nobody takes."""
        if not self._bound and not self.steps_elsewhere:
            names = ", ".join(sorted({name_of(group["update"]) for group in self.param_groups}))
            raise UserError(
                f"the update {names} needs all shards at once: give this optimizer to lso.LandscapeOptimizer, "
                "lso.Engine or lso.initialize, which step it."
            )

    def bind(self, space: ParameterSpace, parameters: Mapping[str, Tensor]) -> list[Family]:
        """Take the parameters of this space (by name), in the partitions that there are now; what it remembers."""
        groups = [self._by_id[id(parameters[p.name])] for p in space.layout.parameters]
        rules = [group["update"] for group in self.param_groups]
        self._bound, families, taken = [], list[Family](), list[Any]()
        for number, rule in enumerate(rules):
            if any(rule == other for other in taken):
                continue
            taken.append(rule)
            chosen = [i for i, g in enumerate(groups) if rules[g] == rule]
            if not chosen:
                continue
            own = space.restricted(chosen)
            name = f"{FAMILY}{name_of(rule)}"
            name += f"-{number}" if any(f.name == name for f in families) else ""
            if isinstance(rule, Update):
                family: Kept | TorchFamily = Kept(UpdateFamily(rule, name), own)
            else:
                kind, options = rule
                family = TorchFamily(name, kind, own, dict(options))
            families.append(family)
            self._bound.append((family, [groups[i] for i in chosen]))
        return families

    @torch.no_grad()
    def take(self, gradient: Vector) -> None:
        """Step on the masters with this gradient of the whole space, which may be overwritten (collective)."""
        for family, groups in self._bound:
            space = family.space
            place = getattr(space.shards, "of", list)
            own = Vector(space, place(gradient.tensors))
            rates = Rates(
                tuple(float(self.param_groups[g]["lr"]) for g in groups),
                tuple(float(self.param_groups[g]["weight_decay"]) for g in groups),
            )
            first = self.param_groups[groups[0]]
            if isinstance(family, TorchFamily):
                family.step(own, rates, first)
                continue
            assert isinstance(family.kind, UpdateFamily)
            rule = family.kind.update
            said = {f.name: first[f.name] for f in fields(rule) if f.name in first} if is_dataclass(rule) else {}
            (replace(rule, **said) if said else rule).update(space, own, family.state, rates)  # type: ignore[type-var]


Rule = Update | tuple[type[torch.optim.Optimizer], tuple[tuple[str, Any], ...]]


def resolved(update: Any, options: Mapping[str, Any]) -> Rule:
    """The update that is meant: itself, by name among ours, or a class of torch.optim with its options."""
    if isinstance(update, Update) or (isinstance(update, tuple) and len(update) == 2):
        return update
    if isinstance(update, str) and update in registry.names():
        kind = registry.get(update)
        own = {f.name for f in fields(kind)} if is_dataclass(kind) else set(options)
        return registry.build(update, **{k: v for k, v in options.items() if k in own})
    kind = {n.lower(): c for n, c in vars(torch.optim).items() if isinstance(c, type)}.get(str(update).lower())
    if kind is None:
        raise UserError(
            f"update={update!r} is neither one of {', '.join(registry.names())} nor a class of torch.optim; give one."
        )
    return kind, tuple(sorted(options.items()))


def name_of(rule: Rule) -> str:
    """What messages and files call it."""
    if not isinstance(rule, Update):
        return rule[0].__name__.lower()
    return next((n for n, c in registry.updates.known.items() if c is type(rule)), type(rule).__name__.lower())


def updates_of(base: Any) -> UpdateOptimizer | None:
    """The base as an `UpdateOptimizer`, where it is one."""
    return base if isinstance(base, UpdateOptimizer) else None
