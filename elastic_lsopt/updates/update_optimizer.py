"""An update rule as the base optimizer that DeepSpeed, FSDP2, a scheduler and a launcher's JSON know how to hold.

    base = UpdateOptimizer(model.parameters(), "lamb", lr=2e-3, weight_decay=0.01, betas=(0.9, 0.98))
    base = UpdateOptimizer([{"params": matrices, "update": "muon", "lr": 0.02}, {"params": rest}], "AdamW", lr=3e-4)

An update's hyper-parameters are entries of its param groups, where schedules and rules of batch scaling find them and
where each step reads them. What it remembers is one state family per kind of update, whichever groups its parameters
are in, so that no order of groups and no edit of their rates loses it.

[Note: where it steps] A framework calls a base's `step()` once per flat partition, with the others empty, and a rule
that needs whole parameters cannot step there. So the step is made before, on the masters of all partitions at once
(`take`), and the framework's own call, which finds nothing to do, is what makes its copies right afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from elastic_lsopt.errors import UserError
from elastic_lsopt.oracle.family import Family, Kept, Stateful
from elastic_lsopt.oracle.method import State
from elastic_lsopt.space.geometry import ParameterSpace
from elastic_lsopt.space.vector import Vector
from elastic_lsopt.updates.group_rules import Rule, entries, known_entries, name_of, now, refuse_decay, resolved
from elastic_lsopt.updates.torch_update import TorchFamily
from elastic_lsopt.updates.update import Rates, Update

FAMILY = "update/"
EVERY_GROUPS = {"params", "param_names", "lr", "weight_decay", "update", "initial_lr", "name"}
"""Entries of a param group that are no hyper-parameters of its update."""


class UpdateFamily(Stateful):
    """What an update remembers, as a state family."""

    def __init__(self, update: Update, name: str) -> None:
        self.update, self.name = update, name

    def init(self, space: ParameterSpace) -> State:
        return self.update.init(space)


@dataclass
class Bound:
    """A kind of update with its parameters, and the param group of each."""

    family: Kept | TorchFamily
    groups: list[int]
    parts: dict[tuple[int, ...], ParameterSpace] = field(default_factory=dict)
    """Some of the parameters as spaces of their own, where groups differ in hyper-parameters."""

    def part(self, chosen: Sequence[int]) -> ParameterSpace:
        key = tuple(chosen)
        if key not in self.parts:
            self.parts[key] = self.family.space.restricted(key)
        return self.parts[key]


class UpdateOptimizer(torch.optim.Optimizer):
    """Param groups with an update each; `update` and `options` serve the groups that do not say their own.

    An update is an `Update`, its class, the name of one ("lamb", "module:Class"), or a class of torch.optim that works
    element by element, or its name ("AdamW"). Steps inside an `Engine`, a `LandscapeOptimizer` or `lso.initialize`
    only. Raises UserError for an update that is not known, and for an option that it does not have.
    """

    def __init__(
        self, params: Any, update: Any = "lamb", *, lr: float, weight_decay: float = 0.0, **options: Any
    ) -> None:
        self._rules: list[Rule] = []
        """Of each param group."""
        self._by_id: dict[int, int] = {}
        self._bound: list[Bound] = []
        self._taken = False
        self.steps_elsewhere = False
        """A framework calls `step()` when it likes; see the note above."""
        self._options, self._used = options, set[str]()
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "update": update})
        if strange := sorted(options.keys() - self._used):
            names = ", ".join(sorted({group["update"] for group in self.param_groups}))
            raise UserError(f"no update here ({names}) has a hyper-parameter {', '.join(strange)}; remove it.")
        for key in ("betas", "momentum"):  # where schedules that move momentum look for one that all groups have
            if all(key in group for group in self.param_groups):
                self.defaults[key] = self.param_groups[0][key]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        said = {k: v for k, v in param_group.items() if k not in EVERY_GROUPS}
        rule = resolved(param_group.get("update", self.defaults["update"]))
        known = known_entries(rule)
        for key in said:
            if key not in known:
                raise UserError(
                    f"a param group's update {name_of(rule)!r} has no hyper-parameter {key!r}; it has: "
                    f"{', '.join(known) or 'none'}."
                )
        shared = {k: v for k, v in self._options.items() if k in known}
        self._used |= shared.keys()
        found = entries(rule, {**shared, **said})
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        refuse_decay(rule, group["weight_decay"])
        for key in group.keys() - EVERY_GROUPS:  # a default of other groups
            del group[key]
        group.update(found, update=name_of(rule))
        self._rules.append(rule)
        self._by_id.update({id(p): len(self.param_groups) - 1 for p in group["params"]})

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:  # type: ignore[override]
        """The param groups' entries. Raises UserError where a group was saved with another update."""
        for i, (mine, theirs) in enumerate(zip(self.param_groups, state_dict["param_groups"], strict=False)):
            if mine["update"] != theirs.get("update"):
                raise UserError(
                    f"param group {i} was saved with update={theirs.get('update')!r} and has {mine['update']!r} here; "
                    "build the same groups."
                )
        super().load_state_dict(dict(state_dict))

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """What a framework calls after `take`. Raises UserError where nothing was taken."""
        if not self._taken and not self.steps_elsewhere:
            names = ", ".join(sorted({group["update"] for group in self.param_groups}))
            raise UserError(
                f"the update {names} needs all shards at once and is stepped by what holds it: give this optimizer to "
                "lso.LandscapeOptimizer, lso.Engine.of or lso.initialize, and step that."
            )
        self._taken = False

    def bind(self, space: ParameterSpace, parameters: Mapping[str, Tensor]) -> list[Family]:
        """Take the parameters of this space (by name), in the partitions that there are now; what it remembers."""
        # What took the place of a parameter since it was added (accelerate's of `fully_shard`) is in the groups now.
        self._by_id.update({id(p): i for i, group in enumerate(self.param_groups) for p in group["params"]})
        groups = [self._by_id[id(parameters[p.name])] for p in space.layout.parameters]
        by_name: dict[str, list[int]] = {}
        for i, g in enumerate(groups):
            by_name.setdefault(self.param_groups[g]["update"], []).append(i)
        self._bound = []
        for name, chosen in by_name.items():
            of, own = [groups[i] for i in chosen], space.restricted(chosen)
            rule = now(self._rules[of[0]], self.param_groups[of[0]])
            if isinstance(rule, Update):
                family: Kept | TorchFamily = Kept(UpdateFamily(rule, f"{FAMILY}{name}"), own)
            else:
                known = known_entries(rule)
                said = {g: {k: v for k, v in self.param_groups[g].items() if k in known} for g in of}
                family = TorchFamily(f"{FAMILY}{name}", rule, own, of, said)
            self._bound.append(Bound(family, of))
        return [bound.family for bound in self._bound]

    @torch.no_grad()
    def take(self, gradient: Vector) -> None:
        """Step on the masters with this gradient of the whole space, which may be overwritten (collective)."""
        for bound in self._bound:
            space = bound.family.space
            own = Vector(space, _of(space, gradient))
            if isinstance(bound.family, TorchFamily):
                bound.family.step(own, self.param_groups)
            else:
                self._update(bound, bound.family, own)
        self._taken = True

    def _update(self, bound: Bound, family: Kept, gradient: Vector) -> None:
        """One call per set of hyper-parameters; groups that differ in rate and decay alone go together."""
        rules = {g: now(self._rules[g], self.param_groups[g]) for g in bound.groups}
        alike: list[tuple[Any, list[int]]] = []
        for i, g in enumerate(bound.groups):
            for other, chosen in alike:
                if other == rules[g]:
                    chosen.append(i)
                    break
            else:
                alike.append((rules[g], [i]))
        if len(alike) == 1:
            _stepped(alike[0][0], family.space, gradient, family.state, self._rates(bound.groups))
            return
        began = dict(family.state)
        for rule, chosen in alike:
            space = bound.part(chosen)
            state = {k: Vector(space, _of(space, v)) if isinstance(v, Vector) else v for k, v in began.items()}
            rates = self._rates([bound.groups[i] for i in chosen])
            _stepped(rule, space, Vector(space, _of(space, gradient)), state, rates)
            family.state.update({k: v for k, v in state.items() if not isinstance(v, Vector)})

    def _rates(self, groups: Sequence[int]) -> Rates:
        said = [self.param_groups[g] for g in groups]
        return Rates(tuple(float(g["lr"]) for g in said), tuple(float(g["weight_decay"]) for g in said))


def _of(space: ParameterSpace, whole: Vector) -> list[Tensor]:
    """The tensors of a Vector of the space that this one is a part of."""
    return whole.tensors if whole.space is space else getattr(space.shards, "of", list)(whole.tensors)


def _stepped(rule: Update, space: ParameterSpace, gradient: Vector, state: dict[str, Any], rates: Rates) -> None:
    told: Any = rule.update(space, gradient, state, rates)
    if told is not None:
        raise UserError(
            f"{type(rule).__name__}.update returned a {type(told).__name__}; it must move space.weights in place and "
            "return nothing."
        )


def updates_of(base: Any) -> UpdateOptimizer | None:
    """The base as an `UpdateOptimizer`, where it is one."""
    return base if isinstance(base, UpdateOptimizer) else None
