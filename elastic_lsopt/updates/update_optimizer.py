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

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from elastic_lsopt.errors import UserError
from elastic_lsopt.oracle.family import Family, Kept, Stateful
from elastic_lsopt.oracle.method import State
from elastic_lsopt.oracle.observation import HowProducts, Observation, Seen, Sees
from elastic_lsopt.space.geometry import ParameterSpace
from elastic_lsopt.space.vector import Vector
from elastic_lsopt.updates.group_rules import Rule, entries, known_entries, name_of, now, refuse_decay, resolved
from elastic_lsopt.updates.torch_update import TorchFamily
from elastic_lsopt.updates.update import Rates, Update, keep_numbers, numbers

FAMILY = "update/"
PARTS = 64
"""Spaces of some parameters that are kept to be used again."""
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
            if len(self.parts) >= PARTS:  # each step may use other parameters: experts
                self.parts.clear()
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

    def __getstate__(self) -> dict[str, Any]:
        """For copies, as torch's; what updates remember is with what steps this, which carries it into a copy."""
        own = ("_rules", "_options", "_used", "steps_elsewhere")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # also of load_state_dict, with the groups alone
        self._by_id = {id(p): i for i, group in enumerate(self.param_groups) for p in group["params"]}
        vars(self).setdefault("_bound", [])
        vars(self).setdefault("_taken", False)

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
        """Take the parameters of this space (by name), in the partitions that there are now; what it remembers.

        Raises UserError for one that is in no param group.
        """
        # What took the place of a parameter since it was added (accelerate's of `fully_shard`) is in the groups now.
        self._by_id.update({id(p): i for i, group in enumerate(self.param_groups) for p in group["params"]})
        strange = [p.name for p in space.layout.parameters if id(parameters[p.name]) not in self._by_id]
        if strange:
            raise UserError(
                f"{strange[0]} is to be trained and is in no param group of the UpdateOptimizer, as are {len(strange)} "
                "parameters in all; give it to a group, or set its requires_grad to False."
            )
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
            self._bound.append(bound := Bound(family, of))
            if isinstance(family, Kept):
                list(self._parts(bound, family))  # refuses
        return [bound.family for bound in self._bound]

    @torch.no_grad()
    def take(self, gradient: Vector, alone: Collection[str] = frozenset()) -> None:
        """Step on the masters with this gradient of the whole space, which may be overwritten (collective).

        `alone` are the parameters that stay as they are, the same on all ranks: nothing gave them a gradient.
        """
        for bound in self._bound:
            space = bound.family.space
            own = Vector(space, _of(space, gradient))
            still = frozenset(i for i, p in enumerate(space.layout.parameters) if p.name in alone)
            if len(still) == len(space.layout.parameters):
                continue
            if isinstance(bound.family, TorchFamily):
                bound.family.step(own, self.param_groups, still)
            else:
                for rule, part, state, groups in self._parts(bound, bound.family, still):
                    rates = self._rates(groups, still if rule.together else frozenset())
                    _stepped(rule, part, Vector(part, _of(part, own)), state, rates)
        self._taken = True

    @property
    def bound(self) -> Sequence[Bound]:
        """The kinds of update with their parameters, as they are bound now."""
        return self._bound

    def group_of(self, parameter: Tensor) -> dict[str, Any]:
        """The param group of a parameter."""
        return self.param_groups[self._by_id[id(parameter)]]

    def rule_of(self, group: Mapping[str, Any]) -> Rule:
        """What a param group steps by."""
        return next(rule for own, rule in zip(self.param_groups, self._rules, strict=True) if own is group)

    def looking(self) -> list[tuple[str, Sees]]:
        """The names of updates that look at more than the gradient, and at what."""
        return [(name, kind.sees) for name, kind in self._kinds().items() if kind.sees != "nothing"]

    def points(self) -> list[str]:
        """The names of updates that evaluate elsewhere than at the weights."""
        return [name for name, kind in self._kinds().items() if kind.point is not Update.point]

    def _kinds(self) -> dict[str, type[Update]]:
        kinds = {name_of(rule): rule if isinstance(rule, type) else type(rule) for rule in self._rules}
        return {name: kind for name, kind in kinds.items() if issubclass(kind, Update)}

    def observations(self, step: int, passes: int, how: HowProducts) -> list[Observation]:
        """What updates look at in this step, which has so many passes; one observation serves all that want it."""

        def before(rule: Update) -> int:
            return 0 if rule.where == "weights" else passes - 1

        def tell(sees: Sees, at: int, seen: Seen) -> None:
            for rule, part, state, own in self._looking(step, seen.vector):
                if (rule.sees, before(rule)) == (sees, at):
                    rule.observe(part, Seen(own, seen.weight), state)
                    keep_numbers(part, state, "seen", [n + 1 for n in numbers(part, state, "seen", 0)])

        due: list[tuple[Sees, int]] = [(rule.sees, before(rule)) for rule, *_ in self._looking(step, None)]
        return [Observation(sees, at, partial(tell, sees, at), how) for sees, at in dict.fromkeys(due)]

    def _looking(self, step: int, seen: Vector | None) -> Iterator[tuple[Update, ParameterSpace, dict[str, Any], Any]]:
        """The updates that look in this step, with their part of what is seen."""
        for bound in self._bound:
            family = bound.family
            if isinstance(family, TorchFamily):
                continue
            own = Vector(family.space, _of(family.space, seen)) if seen is not None else None
            for rule, part, state, _ in self._parts(bound, family):
                new = rule.sees != "nothing" and 0 in numbers(part, state, "seen", 0)
                if new or (rule.sees != "nothing" and rule.sees_at(step)):
                    yield rule, part, state, Vector(part, _of(part, own)) if own is not None else None

    def point(self, name: str, space: ParameterSpace) -> Vector:
        """The weights of the whole space, those of the update of this name where it evaluates them; an own Vector."""
        whole = space.weights.clone()
        for bound in self._bound:
            family = bound.family
            if isinstance(family, Kept) and family.name == f"{FAMILY}{name}":
                for rule, part, state, _ in self._parts(bound, family):
                    at = rule.point(part, state)
                    assert at is not None
                    Vector(part, _of(part, Vector(family.space, _of(family.space, whole)))).copy_(at)
        return whole

    def _parts(
        self, bound: Bound, family: Kept, still: Collection[int] = frozenset()
    ) -> Iterator[tuple[Update, ParameterSpace, dict[str, Any], Sequence[int]]]:
        """Each set of hyper-parameters with its parameters, what is remembered of them, and the param group of each.

        Groups that differ in rate and decay alone go together. Numbers are put back where the next part is asked for.
        The parameters numbered `still` are left out, but of rules that work on all together.
        """
        rules = {g: now(self._rules[g], self.param_groups[g]) for g in bound.groups}
        alike: list[tuple[Any, list[int]]] = []
        for i, g in enumerate(bound.groups):
            for other, chosen in alike:
                if other == rules[g]:
                    chosen.append(i)
                    break
            else:
                alike.append((rules[g], [i]))
        if len(alike) == 1 and (not still or alike[0][0].together):
            yield alike[0][0], family.space, family.state, bound.groups
            return
        if any(rule.together for rule, _ in alike):
            raise UserError(
                f"update {family.name.removeprefix(FAMILY)} works on all its parameters together, and its param groups "
                f"have other hyper-parameters: {alike[0][0]} and {alike[1][0]}; give them the same (rate and decay may "
                "differ)."
            )
        began = dict(family.state)
        for rule, every in alike:
            if not (chosen := [i for i in every if i not in still]):
                continue
            space = bound.part(chosen)
            state = {k: Vector(space, _of(space, v)) if isinstance(v, Vector) else v for k, v in began.items()}
            yield rule, space, state, [bound.groups[i] for i in chosen]
            changed = {k: v for k, v in state.items() if not isinstance(v, Vector) and began.get(k) != v}
            family.state.update(changed)  # what is another part's stays as that part has left it

    def _rates(self, groups: Sequence[int], alone: frozenset[int]) -> Rates:
        said = [self.param_groups[g] for g in groups]
        return Rates(tuple(float(g["lr"]) for g in said), tuple(float(g["weight_decay"]) for g in said), alone)


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
